"""One rating explained beside what is in Kafka at its place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ray_pipeline.codec import encode_values
from ray_pipeline.config import Settings
from ray_pipeline.errors import UncheckedError
from ray_pipeline.formats.factory import open_format
from ray_pipeline.kafka.read import Record, read_topic_from
from ray_pipeline.model.catalogue import Catalogue, load_catalogue
from ray_pipeline.truth.explain import explain
from ray_pipeline.truth.follower import Follower
from ray_pipeline.truth.replay import ShardReplay, build_models
from ray_pipeline.verification.audit import PublishedRun, published_run
from ray_pipeline.verification.outside import OutsideLedger
from ray_pipeline.windows.spec import window_specs

__all__ = ["Explainer"]

_NEAR = 200


class Explainer:
    """Explains ratings of a run.

    Args:
        settings: names the topics and the catalogue; events and windows are the run's own.
        bootstrap: brokers, HOST:PORT[,…].

    Raises:
        UncheckedError: there is no run, or it cannot be regenerated here.
    """

    def __init__(self, settings: Settings, bootstrap: str) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._replays: dict[int, ShardReplay] = {}
        self._outside = OutsideLedger(settings, bootstrap)
        self._run: PublishedRun
        self.refresh()
        self._wire = open_format(self._run.settings)
        self._catalogue: Catalogue = load_catalogue(self._run.settings)

    def refresh(self) -> None:
        """Read again what the run publishes: it may have gone on, or changed its rate."""
        self._run = published_run(self._settings, self._bootstrap)
        for partition, replay in self._replays.items():
            replay.update(self._run.progress[partition])

    def by_index(self, partition: int, index: int) -> dict[str, Any]:
        """Explain rating ``index`` of a partition; ``kafka`` has the record that stands where it must.

        Raises:
            UncheckedError: there is no such partition, the index is below 0, or the plan does not reach it.
        """
        if index < 0:
            raise UncheckedError(problem=f"index {index} is below 0", fix="Ratings are counted from 0")
        replay = self._replay(partition)
        found = explain(replay, index, self._run.settings, self._catalogue, window_specs(self._run.settings))
        return {**found, "kafka": self._shown(self._record_of(replay, index), found["value"])}

    def by_offset(self, partition: int, offset: int) -> dict[str, Any]:
        """Explain the record at an offset, or the next data record; ``foreign`` when it is no rating of the run.

        A foreign one has ``outside``: whether it is a rating that was posted and so accounted for.

        Raises:
            UncheckedError: there is no such partition or record.
        """
        replay = self._replay(partition)
        record = next(iter(self._read(partition, offset)), None)
        if offset < 0 or record is None:
            raise UncheckedError(
                problem=f"partition {partition} has no record at offset {offset} or behind it",
                fix="See ray-pipeline topics count for what there is",
            )
        index = self._index_of(replay, record)
        if index is None:
            key = None if record.key is None else record.key.encode()
            outside = self._outside.refresh().holds(partition, record.offset, key, record.value)
            shown = self._shown(record, None)
            return {"partition": partition, "index": None, "foreign": True, "outside": outside, "kafka": shown}
        found = explain(replay, index, self._run.settings, self._catalogue, window_specs(self._run.settings))
        return {**found, "kafka": self._shown(record, found["value"])}

    # -- inside

    def _replay(self, partition: int) -> ShardReplay:
        if partition not in self._run.progress:
            known = ", ".join(map(str, sorted(self._run.progress))) or "none"
            raise UncheckedError(
                problem=f"partition {partition} has no ratings of this run", fix=f"The partitions are: {known}"
            )
        if partition not in self._replays:
            settings = self._run.settings
            model = build_models(settings, self._catalogue, [partition])[partition]
            self._replays[partition] = ShardReplay(model, self._run.progress[partition], settings.guard_ms)
        return self._replays[partition]

    def _read(self, partition: int, offset: int) -> Iterator[Record]:
        """Records of a partition from an offset on, their values in the contract's form where they are in the run's format."""
        topic = self._run.settings.ratings_topic
        for record in read_topic_from(self._bootstrap, topic, partition, offset):
            yield replace(record, value=self._wire.from_wire([record.value])[0])

    def _index_of(self, replay: ShardReplay, record: Record) -> int | None:
        """Which rating a record is; one that is broken on purpose follows from those that stand before it."""
        if replay.valid is None:
            return replay.index_of(record.value)
        return dict(self._named(replay, record.offset - _NEAR, record.offset)).get(record.offset)

    def _named(self, replay: ShardReplay, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Offsets and indexes of the ratings of a shard whose records are broken on purpose, at offsets ``first … last``."""
        follower = Follower(replay, None)
        for record in self._read(replay.partition, max(0, first)):
            if record.offset > last:
                return
            index = follower.index_of(record.value)
            if index is not None:
                yield record.offset, index

    def _record_of(self, replay: ShardReplay, index: int) -> Record | None:
        """The record of a rating: markers of transactions take offsets too, so it stands at its index or behind it."""
        value = encode_values(replay.events(index, 1))[0]
        low, high = index, None
        first = next(iter(self._read(replay.partition, low)), None)
        while first is not None:
            there = replay.index_of(first.value)
            if first.value == value and there == index:
                return first
            if there is None or there > index:
                break
            step = max(index - there, 1)
            low, high = first.offset + step, first
            first = next(iter(self._read(replay.partition, low)), None)
        start = max(0, (high.offset if high else index) - _NEAR)
        near = list(itertools.islice(self._read(replay.partition, start), 2 * _NEAR))
        if replay.valid is not None and near:
            place = {i: offset for offset, i in self._named(replay, start, near[-1].offset)}.get(index)
            return next((record for record in near if record.offset == place), None)
        return next((record for record in near if record.value == value), None)

    @staticmethod
    def _shown(record: Record | None, must: str | None) -> dict[str, Any] | None:
        if record is None:
            return None
        value = None if record.value is None else record.value.decode(errors="replace")
        return {
            "offset": record.offset,
            "timestamp_ms": record.timestamp_ms,
            "key": record.key,
            "value": value,
            "agrees": value == must,
        }
