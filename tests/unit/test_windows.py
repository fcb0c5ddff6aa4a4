"""Collector, ledger and reference: windows to the last count."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import typer
from confluent_kafka import KafkaError
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.__main__ import app
from ray_pipeline.clock import FakeClock
from ray_pipeline.config import load_settings
from ray_pipeline.errors import ConfigurationError, ProcessingError
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.windows import sink
from ray_pipeline.windows.batch import refuse_others
from ray_pipeline.windows.collector import Collector, Groups
from ray_pipeline.windows.ledger import CountLedger
from ray_pipeline.windows.reference import Ratings, reference
from ray_pipeline.windows.sink import BatchSink
from ray_pipeline.windows.spec import Panes, WindowSpec, iso_ms, window_specs

CATALOGUE = load_catalogue(load_settings(movies=50))
SPECS = (WindowSpec(60_000, 60_000), WindowSpec(300_000, 60_000))
GENRES = {int(m): CATALOGUE.genres[n] for n, m in enumerate(CATALOGUE.movie_ids)}


class Job:
    """What the Spark job would say, in the plainest way: drops by the watermark of the batch before, evicts by its own."""

    def __init__(self, delay_ms: int) -> None:
        self.state: dict[tuple[int, int], list[int]] = {}
        self.delay_ms = delay_ms
        self.records, self.newest_ms, self.watermark_ms = 0, -1, 0

    def batch(self, ratings: list[tuple[int, int, int]]) -> Groups:
        """(movie, half stars, time) → the groups that changed."""
        late_ms, self.watermark_ms = self.watermark_ms, max(self.watermark_ms, self.newest_ms - self.delay_ms)
        changed = set()
        for movie, half, at in ratings:
            pane = at - at % 60_000
            self.records, self.newest_ms = self.records + 1, max(self.newest_ms, at)
            if self.last_end(pane) > late_ms:
                self.state.setdefault((pane, movie), [0] * 10)[half - 1] += 1
                changed.add((pane, movie))
        groups = self.groups(sorted(changed))
        self.state = {key: stars for key, stars in self.state.items() if self.last_end(key[0]) > self.watermark_ms}
        return groups

    def last_end(self, pane: int) -> int:
        return max(pane - pane % spec.slide_ms + spec.size_ms for spec in SPECS)

    def groups(self, rows: list[tuple[int, int]]) -> Groups:
        stars = np.array([self.state[row] for row in rows], np.int64).reshape(-1, 10)
        packed = np.vstack([stars[:, 0::2] | stars[:, 1::2] << 32, [[self.records, 0, 0, 0, 0]]])
        columns = np.array([*rows, (-1, 0)], np.int64)
        nothing = np.full(len(columns), -1, np.int64)
        newest = np.where(columns[:, 0] < 0, self.newest_ms, -1)
        return Groups(columns[:, 0], columns[:, 1], packed, nothing, nothing, newest)


some_ratings = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 10), st.integers(0, 900_000)), min_size=1, max_size=20
)


@given(st.lists(some_ratings, min_size=1, max_size=6), st.integers(0, 6), st.sampled_from([0, 60_000, 10_000_000]))
def test_the_collector_agrees_with_the_reference_late_ratings_and_a_restart_included(
    batches: list[list[tuple[int, int, int]]], restart_before: int, delay_ms: int
) -> None:
    collector, job = Collector(CATALOGUE, SPECS, 5, delay_ms), Job(delay_ms)
    published: dict[str, dict[str, object]] = {}
    for number, ratings in enumerate(batches):
        if number == restart_before:
            collector = Collector(CATALOGUE, SPECS, 5, delay_ms)
            collector.restore(job.groups(sorted(job.state)), job.watermark_ms)
        watermark_ms, groups = collector.next_watermark_ms(), job.batch(ratings)
        changed = collector.apply(groups)
        assert collector.apply(groups) == changed  # absolute: again changes nothing
        for window in changed:
            published.update(collector.records(window, number, 4))
        collector.close(watermark_ms)
        assert watermark_ms == job.watermark_ms
    columns = [Ratings(*(np.array(c) for c in zip(*[(m, h / 2, t) for m, h, t in b], strict=True))) for b in batches]
    keys = set()
    for spec in SPECS:
        for start, window in reference(columns, spec.size_ms, spec.slide_ms, delay_ms).windows.items():
            key = f"{spec.name}|{iso_ms(start)}"
            keys |= {f"{key}|total", f"{key}|topn", f"{key}|genres"}
            total = published[f"{key}|total"]
            assert list(total)[:5] == ["window_start", "window_end", "window_type", "count", "avg_rating"]
            assert (total["count"], total["avg_rating"]) == (window.count, window.avg_rating)
            assert (total["p50"], total["p95"]) == (window.percentile(0.5), window.percentile(0.95))
            assert total["histogram"] == window.histogram()
            top = [(m["movieId"], m["count"], m["avg_rating"]) for m in published[f"{key}|topn"]["movies"]]
            assert top == window.top(5)
            by_genre = [(g["genre"], g["count"], g["avg_rating"]) for g in published[f"{key}|genres"]["genres"]]
            assert by_genre == window.by_genre(GENRES)
    assert set(published) == keys


def test_closed_windows_are_forgotten() -> None:
    collector = Collector(CATALOGUE, SPECS, 5, 0)
    collector.apply(Job(0).batch([(1, 5, 30_000), (1, 5, 200_000)]))
    assert collector.close(60_000) == 2  # the tumbling one and the oldest sliding one, both ending at 60 s
    assert (0, 60_000) not in collector.open and (0, 240_000) in collector.open


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 20), st.integers(0, 5000))
def test_panes_make_up_every_window_exactly(size_s: int, slide_s: int, times: int, at_s: int) -> None:
    specs = (WindowSpec(size_s * 1000, size_s * 1000), WindowSpec(times * slide_s * 1000, slide_s * 1000))
    panes, at_ms = Panes(specs), at_s * 1000
    pane_ms = at_ms - at_ms % panes.size_ms
    inside = {
        (kind, start + spec.size_ms)
        for kind, spec in enumerate(specs)
        for start in range(at_ms - at_ms % spec.slide_ms, at_ms - spec.size_ms, -spec.slide_ms)
    }
    for probe in (pane_ms, pane_ms + panes.size_ms - 1):  # the same for every moment of the pane
        assert all(end - specs[kind].size_ms <= probe < end for kind, end in panes.windows_of(pane_ms))
    assert set(panes.windows_of(pane_ms)) == inside


def test_names_and_alignment_of_windows() -> None:
    assert [spec.name for spec in SPECS] == ["tumbling_1min", "sliding_5min_1min"]
    assert [spec.name for spec in window_specs(load_settings(tumbling_s=90, sliding_s=7200, slide_s=30))] == [
        "tumbling_90s",
        "sliding_2h_30s",
    ]
    assert iso_ms(1_700_000_000_001) == "2023-11-14T22:13:20.001Z"


def test_the_reference_drops_by_the_watermark_of_the_batch_before() -> None:
    def batch(*times: int) -> Ratings:
        return Ratings(np.ones(len(times), np.int64), np.full(len(times), 3.0), np.array(times))

    found = reference([batch(1_000), batch(200_000), batch(2_000), batch(3_000)], 60_000, 60_000, 10_000)
    assert found.late == 1  # 2,000 came in before the watermark of 190,000 counted, 3,000 after
    assert found.windows[0].count == 2


# -- ledger


@given(st.lists(st.lists(st.tuples(st.integers(-6, 8), st.integers(1, 50)), max_size=4), max_size=20), st.data())
def test_the_ledger_counts_each_rating_once_wherever_it_is_killed(
    batches: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    """Micro-batches as Spark makes them: drop by the watermark of the batch before, evict by their own, the newest time so far."""
    ledger, state, late_ms, newest = CountLedger(), dict[int, int](), 0, 1
    total, windows = 0, set[int]()
    for added in batches:
        evict_ms = max(late_ms, newest - 3)
        counts = dict(state)
        for ahead, count in added:
            end = newest + ahead
            if end > late_ms:
                counts[end] = counts.get(end, 0) + count
                total += count
                windows.add(end)
        after = {end: count for end, count in counts.items() if end > evict_ms}
        killed = data.draw(st.sampled_from(("not", "within", "before the commit", "after the commit")))
        if killed in ("within", "before the commit"):  # the batch runs again, on the state of the batch before
            for end in list(counts)[: len(counts) // 2 if killed == "within" else None]:
                ledger.set(end, counts[end])
            if killed == "before the commit":
                ledger.close(evict_ms)
            ledger = restarted(ledger, state, late_ms)
        for end in counts:
            ledger.set(end, counts[end])
        ledger.close(evict_ms)
        if killed == "after the commit":
            ledger = restarted(ledger, after, evict_ms)
        state, late_ms, newest = after, evict_ms, max([newest, *(newest + ahead for ahead, _ in added)])
        assert ledger.counted == total
        record = ledger.as_record()
        assert len(record["open"]) + record["closed_windows"] == len(windows)


def restarted(ledger: CountLedger, state: dict[int, int], watermark_ms: int) -> CountLedger:
    fresh = CountLedger()
    fresh.restore(json.loads(json.dumps(ledger.as_record())), state, watermark_ms)
    return fresh


def test_a_window_that_is_new_in_a_batch_that_was_not_committed_is_not_counted_twice() -> None:
    ledger = CountLedger()
    ledger.set(60, 10)
    ledger.close(0)
    ledger = restarted(ledger, {}, 0)  # the state is that of before the batch, and has no such window
    assert ledger.counted == 0
    ledger.set(60, 10)
    assert ledger.counted == 10


# -- sink


class Away:
    """A broker that is away, to which heartbeat and micro-batch send with one producer: who waits last hears of it first."""

    def __init__(self) -> None:
        self.queued: list[Callable[[Any, Any], None]] = []
        self.heartbeat: Callable[[], None] | None = None

    def produce(self, _topic: str, key: bytes, value: bytes, on_delivery: Callable[[Any, Any], None]) -> None:
        self.queued.append(on_delivery)

    def flush(self, _: float) -> int:
        if self.heartbeat is not None:
            beat, self.heartbeat = self.heartbeat, None
            with pytest.raises(ProcessingError):
                beat()
        for told in self.queued:
            told(KafkaError(KafkaError._MSG_TIMED_OUT), None)
        self.queued.clear()
        return 0


def test_a_micro_batch_hears_of_its_own_records_and_shows_none_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = Away()
    monkeypatch.setattr(sink, "make_producer", lambda *_, **__: away)
    collector = Collector(CATALOGUE, SPECS, 5, 10_000)
    batches = BatchSink(load_settings(), "", collector, SPECS, FakeClock(), lambda *_: [], dict)
    away.heartbeat = batches.publish_job
    none = dict.fromkeys(("a1", "a2", "a3", "a4", "max_rejected"), 0)
    totals = {**none, "pane_ms": None, "id": 0, "a0": 7, "max_offset": 6, "max_event_ms": 1_000}
    pane = {**none, "pane_ms": 0, "id": int(CATALOGUE.movie_ids[0]), "a0": 7, "max_offset": None, "max_event_ms": None}
    frame = SimpleNamespace(toArrow=lambda: pa.Table.from_pylist([totals, pane]))
    with pytest.raises(ProcessingError, match="windows could not be published"):
        batches(frame, 0)
    assert collector.totals[0].records == 7 and batches.totals()["valid"] == 0
    assert batches.batch == -1


@pytest.mark.parametrize(
    "data", [b"\xff" * 900_000, b"\x01" * 900_000, "€".encode() * 300_000], ids=["binary", "control", "text"]
)
def test_a_rejected_record_that_is_very_long_is_cut_and_not_in_the_way(data: bytes) -> None:
    reject = {"partition": 0, "offset": 7, "timestamp_ms": 1, "reason": "x", "key": data, "value": data}
    kept = sink._readable(reject)
    assert len(json.dumps(kept, ensure_ascii=False).encode()) < 600_000  # a producer sends a million bytes at most
    assert kept["key_bytes"] == kept["value_bytes"] == 900_000
    short = sink._readable({**reject, "key": None, "value": b"[1]"})
    assert (short["key"], short["value"]) == (None, "[1]") and "value_bytes" not in short


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
def test_percentiles_are_ratings(share: float) -> None:
    from ray_pipeline.windows.collector import percentile

    histogram = np.array([0, 3, 0, 0, 0, 5, 0, 1, 0, 1])
    stars = np.repeat(np.arange(1, 11) / 2, histogram)
    assert percentile(histogram, share) == stars[max(1, int(np.ceil(share * 10))) - 1]


# -- the batch report


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"ratings_topic": "other"}, "has ratings_topic=ratings, .* not on other. Leave --ratings-topic out"),
        ({"bootstrap_servers": "far:9092"}, "has bootstrap_servers=here:9092"),
        ({"format": "avro"}, "has format=json"),
        ({"max_ahead_s": 5.0}, "Leave --max-ahead out"),
    ],
)
def test_a_report_on_something_else_than_the_running_job_reads_is_refused(asked: dict[str, Any], named: str) -> None:
    settings = load_settings(movies=50)
    with pytest.raises(ConfigurationError, match=named):
        refuse_others(settings, "here:9092", asked, None)
    same = {"ratings_topic": "ratings", "bootstrap_servers": "here:9092", "format": "json", "max_ahead_s": 600.0}
    refuse_others(settings, "here:9092", same, CATALOGUE.digest)
    with pytest.raises(ConfigurationError, match="another catalogue"):
        refuse_others(settings, "here:9092", {}, load_catalogue(load_settings(movies=49)).digest)


def test_the_batch_command_offers_what_acts_and_nothing_else() -> None:
    offered = {option.name for option in typer.main.get_command(app).commands["batch"].params}  # type: ignore[attr-defined]
    assert {"ratings_topic", "catalog", "model", "archive", "from_archive", "parquet", "format"} <= offered
    assert not offered & {"seed", "late_share", "drift", "attack", "arrivals", "rank", "fair_scheduler_file"}
