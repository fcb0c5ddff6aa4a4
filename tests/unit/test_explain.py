"""One rating beside what is in Kafka at its place: found among records of others, and shown as it is where it was altered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.errors import BrokerUnavailableError, UncheckedError
from ray_pipeline.kafka.read import Record
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.truth.outside import OutsideRatings
from ray_pipeline.truth.replay import ShardReplay, build_models
from ray_pipeline.verification import explain as explain_module
from ray_pipeline.verification.audit import PublishedRun
from ray_pipeline.verification.explain import Explainer

START_MS = 1_700_000_000_000
COUNT = 3_000
POSTED = b'{"userId":4,"movieId":7,"rating":3.0,"timestamp":1700000001000}'


class Partition:
    """Partition 1 of a topic in memory, and what the run published."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        self.settings: Settings = load_settings(users=5_000, movies=2_000, partitions=2, actors=1, **changes)
        self.records: dict[int, tuple[bytes | None, bytes | None]] = {}
        self.outside = OutsideRatings()
        self.run = "first"
        self.down = False
        self.reads = 0
        catalogue = load_catalogue(self.settings)
        self.config = self.settings.digest(catalogue.digest)
        self.replay = ShardReplay(build_models(self.settings, catalogue, [1])[1], self.progress, self.settings.guard_ms)
        monkeypatch.setattr(explain_module, "published_run", lambda *_: self._published())
        monkeypatch.setattr(explain_module, "read_topic_from", self._read)
        monkeypatch.setattr(explain_module, "OutsideLedger", lambda *_: self)
        self.explainer = Explainer(self.settings, "nowhere:1")

    @property
    def progress(self) -> ShardProgress:
        seed = self.settings.seed if self.settings.arrivals == "poisson" else None
        plan = (Epoch(START_MS, 400.0),)
        return ShardProgress(self.run, self.config, 1, COUNT, START_MS, START_MS, plan, 0.5, 0.75, seed)

    @property
    def ratings(self) -> OutsideRatings:
        return self.outside

    def refresh(self) -> OutsideRatings:
        return self.outside

    def close(self) -> None:
        pass

    def fill(self, strangers: int = 0, posted: int = 0, markers: int = 40) -> list[int]:
        """The ratings, and behind every so many of them something else; the offset of each rating."""
        events = self.replay.events(0, COUNT)
        offset, offsets = 0, []
        for n, row in enumerate(zip(encode_keys(events), encode_values(events), strict=True), 1):
            self.records[offset] = row
            offsets.append(offset)
            offset += 1 + (n % markers == 0)
            if strangers and n % strangers == 0:
                self.records[offset] = (b"4", b"rubbish")
                offset += 1
            if posted and n % posted == 0:
                self.records[offset] = (b"4", POSTED)
                self.outside.add({"partition": 1, "offset": offset, **json.loads(POSTED)})
                offset += 1
        return offsets

    def alter(self, offset: int, **fields: Any) -> None:
        key, value = self.records[offset]
        self.records[offset] = key, json.dumps({**json.loads(value or b""), **fields}, separators=(",", ":")).encode()

    def _published(self) -> PublishedRun:
        run = {"run": self.run, "config": self.config}
        return PublishedRun(self.settings, run, None, {1: self.progress}, ())

    def _read(self, bootstrap: str, topic: str, partition: int, offset: int) -> Iterator[Record]:
        if self.down:
            raise KafkaException(KafkaError(KafkaError._ALL_BROKERS_DOWN))
        self.reads += 1
        for at, (key, value) in sorted(self.records.items()):
            if at >= offset:
                yield Record(topic, partition, at, None if key is None else key.decode(), value, START_MS)


@pytest.mark.parametrize("among", [{}, {"posted": 9}, {"strangers": 1, "markers": 1}, {"strangers": 3, "posted": 2}])
def test_every_rating_is_found_whatever_stands_between(monkeypatch: pytest.MonkeyPatch, among: dict[str, int]) -> None:
    partition = Partition(monkeypatch)
    offsets = partition.fill(**among)
    for index in [0, 1, *range(2, COUNT, 331), COUNT - 1]:
        found = partition.explainer.by_index(1, index)
        assert (found["kafka"]["offset"], found["kafka"]["agrees"], found["kafka"]["differs"]) == (
            offsets[index],
            True,
            "",
        )
        assert found["kafka"]["value"] == found["value"] and found["kafka"]["key"] == found["key"]
        assert partition.explainer.by_offset(1, offsets[index])["index"] == index
    assert partition.reads < 14 * 20


@pytest.mark.parametrize("index", [0, 1_234, COUNT - 1])
def test_an_altered_record_is_shown_at_its_place_with_each_field_that_differs(
    monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    partition = Partition(monkeypatch)
    offsets = partition.fill(strangers=50, posted=11)
    right = json.loads(partition.records[offsets[index]][1] or b"")
    stars = 0.5 if right["rating"] != 0.5 else 5.0
    partition.alter(offsets[index], rating=stars)
    said = f"rating is {stars}, must be {right['rating']}"
    for found in (partition.explainer.by_index(1, index), partition.explainer.by_offset(1, offsets[index])):
        assert found["index"] == index and json.loads(found["value"]) == right
        assert (found["kafka"]["offset"], found["kafka"]["agrees"]) == (offsets[index], False)
        assert json.loads(found["kafka"]["value"])["rating"] == stars and found["kafka"]["differs"] == said
    neighbour = 1 if index == 0 else index - 1
    assert partition.explainer.by_index(1, neighbour)["kafka"]["agrees"]


def test_another_key_or_another_way_to_write_it_differs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(monkeypatch)
    offsets = partition.fill()
    _, value = partition.records[offsets[70]]
    partition.records[offsets[70]] = b"99", value
    partition.records[offsets[80]] = (
        partition.records[offsets[80]][0],
        (partition.records[offsets[80]][1] or b"") + b" ",
    )
    key, text = (partition.explainer.by_index(1, index)["kafka"] for index in (70, 80))
    assert not key["agrees"] and "the key is 99, must be" in key["differs"]
    assert not text["agrees"] and "the value is written" in text["differs"]


def test_many_altered_ones_in_a_row_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(monkeypatch)
    offsets = partition.fill()
    for index in range(500, 550):
        partition.alter(offsets[index], movieId=1_999_999)
    for index in (500, 531, 549):
        assert partition.explainer.by_index(1, index)["kafka"]["offset"] == offsets[index]
        assert partition.explainer.by_offset(1, offsets[index])["index"] == index


def test_what_is_missing_is_not_there_and_what_is_foreign_is_no_rating(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(monkeypatch)
    offsets = partition.fill(strangers=100, posted=77)
    for index in [0, *range(1_000, 1_400)]:
        del partition.records[offsets[index]]
    for index in (0, 1_000, 1_200, 1_399, COUNT + 5):
        assert partition.explainer.by_index(1, index)["kafka"] is None
    assert partition.explainer.by_index(1, 1_400)["kafka"]["agrees"]
    stranger = next(at for at, (_, value) in partition.records.items() if value == b"rubbish")
    posted = next(at for at, (_, value) in partition.records.items() if value == POSTED)
    for offset, outside in ((stranger, False), (posted, True)):
        found = partition.explainer.by_offset(1, offset)
        assert (found["index"], found["foreign"], found["outside"]) == (None, True, outside)
    with pytest.raises(UncheckedError, match="no record at offset"):
        partition.explainer.by_offset(1, 2**63)


def test_thousands_of_others_in_a_row_are_passed_over_or_it_is_said_that_they_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partition = Partition(monkeypatch)
    offsets = partition.fill()
    flood = dict.fromkeys(range(10**6, 10**6 + 6_000), (b"4", b"rubbish"))
    behind = {at + 2 * 10**6: row for at, row in partition.records.items() if at > offsets[1_000]}
    partition.records = {at: row for at, row in partition.records.items() if at <= offsets[1_000]} | flood | behind
    assert partition.explainer.by_index(1, 900)["kafka"]["offset"] == offsets[900]
    assert partition.explainer.by_index(1, 2_000)["kafka"]["offset"] == offsets[2_000] + 2 * 10**6
    assert partition.explainer.by_offset(1, 10**6 + 3_000)["foreign"]
    partition.records |= dict.fromkeys(range(10**6 + 6_000, 10**6 + 30_000), (b"4", b"rubbish"))
    del partition.records[offsets[1_000]]
    with pytest.raises(UncheckedError, match="do not tell which rating"):
        partition.explainer.by_index(1, 1_000)


def test_records_that_are_broken_on_purpose_are_found_and_altered_ones_among_them_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partition = Partition(monkeypatch, malformed_share=0.1, duplicate_share=0.1, tombstone_share=0.05)
    offsets = partition.fill(posted=10)
    for index in range(0, COUNT, 97):
        found = partition.explainer.by_index(1, index)["kafka"]
        assert (found["offset"], found["agrees"]) == (offsets[index], True), index
        assert partition.explainer.by_offset(1, offsets[index])["index"] == index
    whole = partition.replay.fates(1_500, 50)
    assert whole is not None
    index = 1_500 + int((whole.faults == 0).argmax())
    partition.alter(offsets[index], movieId=1_999_999)
    found = partition.explainer.by_index(1, index)["kafka"]
    assert found["offset"] == offsets[index] and "movieId is 1999999" in found["differs"]


def test_a_rating_far_ahead_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(monkeypatch, arrivals="poisson")
    for index in (COUNT + 1_000_000, 100_000_000_000, 2**70):
        with pytest.raises(UncheckedError, match="has sent 3,000"):
            partition.explainer.by_index(1, index)
    assert partition.explainer.by_index(1, COUNT + 10)["kafka"] is None and not partition.reads > 60


def test_a_broker_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(monkeypatch)
    partition.fill()
    partition.down = True
    for ask in (partition.explainer.by_index, partition.explainer.by_offset):
        with pytest.raises(BrokerUnavailableError, match="cannot be read"):
            ask(1, 5)


def test_another_run_in_the_same_topics_is_explained_by_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(monkeypatch)
    before = partition.explainer.by_index(1, 5)["value"]
    partition.run, partition.settings = "second", replace_seed(partition.settings)
    partition.explainer.refresh()
    assert partition.explainer.by_index(1, 5)["value"] != before


def replace_seed(settings: Settings) -> Settings:
    return settings.model_copy(update={"seed": settings.seed + 1})
