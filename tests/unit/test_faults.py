"""Records that are broken on purpose: what is sent, and what those make of it who check the stream."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ray_pipeline.codec import InvalidRating, decode_value, encode_columns, encode_keys, encode_values
from ray_pipeline.config import FAULT_SHARES, Settings, load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.delivery.memory import MemoryDelivery, MemoryLog
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.events import EventBatch, Fault
from ray_pipeline.generator.plan import NEVER_MS, RatePlan
from ray_pipeline.generator.sequence import ShardSequence, has_sent
from ray_pipeline.generator.shard import Shard
from ray_pipeline.generator.standing import Standing
from ray_pipeline.kafka.read import Record
from ray_pipeline.metrics.expected import ReadCheck
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.faults import Faults, lateness_table, make_faults
from ray_pipeline.model.population import build_user_map
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.truth.answers import AnswerKey, answer_key
from ray_pipeline.truth.audit import PartitionAudit
from ray_pipeline.truth.explain import explain
from ray_pipeline.truth.follower import Follower
from ray_pipeline.truth.grade import grade_deduplicated, grade_flagged
from ray_pipeline.truth.lookup import find_ratings
from ray_pipeline.truth.oracle import Oracle
from ray_pipeline.truth.replay import ShardReplay, build_models
from ray_pipeline.truth.validity import ValidRecords
from ray_pipeline.truth.windows import Cut, ExpectedWindows
from ray_pipeline.verification import grading
from ray_pipeline.windows.reference import Ratings, reference
from ray_pipeline.windows.spec import window_specs

START_MS = 1_700_000_040_000
PLAIN: dict[str, Any] = dict(
    users=300, movies=120, partitions=3, actors=1, tumbling_s=10, sliding_s=30, slide_s=10, top_n=7
)
MANY: dict[str, Any] = dict(
    late_share=0.1,
    late_mean_s=8.0,
    late_max_s=40.0,
    disorder_share=0.2,
    disorder_s=3.0,
    duplicate_share=0.1,
    duplicate_distance=20,
    drop_share=0.05,
    malformed_share=0.03,
    missing_field_share=0.03,
    unknown_field_share=0.03,
    out_of_range_share=0.03,
    tombstone_share=0.03,
    future_share=0.02,
    future_s=86_400.0,
    clock_skew="1:-4s",
    silent="2:every=20s,for=6s",
)
SPOILT = load_settings(**PLAIN, **MANY)
CATALOGUE = load_catalogue(SPOILT)
MODELS = build_models(SPOILT, CATALOGUE, range(3))
SPECS = window_specs(SPOILT)
EPOCHS = (Epoch(START_MS, 50.0), Epoch(START_MS + 30_000, 200.0), Epoch(START_MS + 60_000, 20.0))
SHARES = (0.5, 0.3, 0.2)


def progress(partition: int, next_index: int = 10**9) -> ShardProgress:
    config = SPOILT.digest(CATALOGUE.digest)
    return ShardProgress(
        "run", config, partition, next_index, START_MS, START_MS, EPOCHS, SHARES[partition], (partition + 0.5) / 3
    )


def replays(guard_ms: int = SPOILT.guard_ms) -> dict[int, ShardReplay]:
    return {p: ShardReplay(MODELS[p], progress(p), guard_ms) for p in range(3)}


def with_only(**changes: Any) -> Faults | None:
    return make_faults(load_settings(**PLAIN, **changes), 1)


def due(first: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return START_MS + 10 * np.arange(first, first + count)


# -- the records


@hypothesis_settings(max_examples=60)
@given(st.integers(0, 3000), st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_any_range_of_records_is_the_same_alone(first: int, sizes: list[int]) -> None:
    replay = replays()[0]
    whole = replay.events(first, sum(sizes))
    parts, at = [], first
    for size in sizes:
        parts.append(replay.events(at, size))
        at += size
    assert encode_values(whole) == [v for part in parts for v in encode_values(part)]
    assert encode_keys(whole) == [k for part in parts for k in encode_keys(part)]
    for name in ("timestamps_ms", "faults", "details"):
        assert getattr(whole, name).tolist() == [x for part in parts for x in getattr(part, name).tolist()]


def test_without_faults_a_model_has_none_and_a_batch_carries_none() -> None:
    settings = load_settings(**PLAIN)
    models = build_models(settings, CATALOGUE, [0])
    replay = ShardReplay(models[0], progress(0))
    assert models[0].faults is None and replay.events(0, 10).faults is None and replay.fates(0, 10) is None


@pytest.mark.parametrize("name", FAULT_SHARES)
def test_each_share_is_met_and_touches_nothing_else(name: str) -> None:
    faults = with_only(**{name: 0.2})
    assert faults is not None
    kinds = Counter(faults.kinds(0, 100_000).tolist())
    assert len(kinds) == 2
    assert abs(kinds[Fault.NONE] / 100_000 - 0.8) < 0.006


def test_lost_ratings_are_as_many_as_asked_for_and_change_no_record() -> None:
    faults = with_only(drop_share=0.1)
    assert faults is not None
    assert abs(len(faults.dropped(1000, 50_000)) / 50_000 - 0.1) < 0.006
    assert faults.dropped(1000, 50_000).tolist() == [
        *faults.dropped(1000, 77).tolist(),
        *faults.dropped(1077, 49_923).tolist(),
    ]
    fates = faults.fates(0, 5000, due)
    assert not fates.faults.any() and (fates.times_ms == fates.due_ms).all()


@pytest.mark.parametrize(
    ("law", "mean", "median"), [("fixed", 5.0, 5.0), ("uniform", 5.0, 5.0), ("exponential", 5.0, 5 * math.log(2))]
)
def test_lateness_follows_its_law(law: str, mean: float, median: float) -> None:
    faults = with_only(late_share=0.5, late_law=law, late_mean_s=5.0, late_max_s=3600.0)
    assert faults is not None
    fates = faults.fates(0, 100_000, due)
    late = (fates.due_ms - fates.times_ms)[fates.faults == Fault.LATE] / 1000
    assert abs(late.mean() - mean) < 0.1 and abs(np.median(late) - median) < 0.1
    assert (fates.due_ms == fates.times_ms)[fates.faults == Fault.NONE].all()


def test_lateness_has_a_maximum() -> None:
    assert lateness_table("exponential", 60.0, 90.0).max() == 90_000
    assert lateness_table("exponential", 60.0, 9000.0).max() > 600_000


def test_disorder_stays_within_its_horizon() -> None:
    faults = with_only(disorder_share=0.5, disorder_s=2.0)
    assert faults is not None
    fates = faults.fates(0, 50_000, due)
    back = (fates.due_ms - fates.times_ms)[fates.faults == Fault.OUT_OF_ORDER]
    assert back.min() >= 1 and back.max() <= 2000 and abs(back.mean() - 1000) < 20


def test_future_times_and_a_skewed_clock_shift_by_as_much_as_they_say() -> None:
    faults = with_only(future_share=0.1, future_s=7200.0, clock_skew="1:-30s")
    assert faults is not None
    fates = faults.fates(0, 10_000, due)
    ahead = fates.times_ms - fates.due_ms
    assert set(ahead[fates.faults == Fault.NONE].tolist()) == {-30_000}
    assert set(ahead[fates.faults == Fault.FUTURE].tolist()) == {7_200_000 - 30_000}


def test_a_repeat_is_byte_for_byte_a_valid_record_not_far_before_it() -> None:
    events = replays()[0].events(0, 6000)
    values, keys = encode_values(events), encode_keys(events)
    fates = replays()[0].fates(0, 6000)
    assert fates is not None and events.faults is not None
    repeats = np.flatnonzero(events.faults == Fault.DUPLICATE)
    assert len(repeats) > 400
    for n in repeats.tolist():
        source = int(fates.sources[n])
        assert n - source > 0 and events.faults[source] in (Fault.NONE, Fault.LATE, Fault.OUT_OF_ORDER)
        assert (values[n], keys[n]) == (values[source], keys[source])
    assert np.median(repeats - fates.sources[repeats]) <= 20


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"duplicate_share": 0.01, "duplicate_distance": 1, "malformed_share": 0.5}, 30),
        (
            {"duplicate_share": 0.02, "duplicate_distance": 100, "malformed_share": 0.5, "missing_field_share": 0.4},
            1_500,
        ),
        ({"duplicate_share": 0.5, "duplicate_distance": 50, "tombstone_share": 0.4}, 5_000),
        ({"duplicate_share": 0.1, "duplicate_distance": 20, "late_share": 0.4, "disorder_share": 0.4}, 150),
    ],
)
def test_repeats_lie_within_reach_whatever_lies_between(changes: dict[str, Any], most: int) -> None:
    faults = with_only(**changes)
    assert (
        faults is not None and faults.reach <= most
    )  # all that is in reach is made anew for each record that is looked up
    fates = faults.fates(0, 300_000, due)
    repeats = np.flatnonzero(fates.faults == Fault.DUPLICATE)
    back = repeats - fates.sources[repeats]
    assert len(repeats) > 2_500 and back.max() <= faults.reach


@pytest.mark.parametrize("fault", [f for f in Fault if f >= Fault.UNKNOWN_FIELD])
def test_broken_texts_are_no_ratings_and_unknown_fields_are(fault: Fault) -> None:
    whole = replays()[0].events(0, 200)
    n = len(whole)
    batch = EventBatch(
        0, 0, whole.user_ids, whole.movie_ids, whole.half_stars, whole.timestamps_ms,
        np.full(n, fault, np.uint8), np.arange(n, dtype=np.uint32) * 7919,
    )  # fmt: skip
    values = encode_values(batch)
    assert len(set(values)) > 100 or fault is Fault.TOMBSTONE
    for value, user in zip(values, whole.user_ids.tolist(), strict=True):
        if fault is Fault.UNKNOWN_FIELD:
            assert value is not None and decode_value(value)["userId"] == user and len(json.loads(value)) == 5
        else:
            with pytest.raises(InvalidRating):
                decode_value(value)
    assert fault is not Fault.TOMBSTONE or set(values) == {None}


def test_columns_hold_the_same_texts_and_know_where_there_is_none() -> None:
    events = replays()[0].events(100, 3000)
    _, column = encode_columns(events)
    values = encode_values(events)
    assert column.missing is not None
    for n, value in enumerate(values):
        text = bytes(column.data[column.offsets[n] : column.offsets[n + 1]])
        assert (None if column.missing[n] else text) == value


# -- settings


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"late_share": 0.5, "disorder_share": 0.5}, "late_share"),
        ({"clock_skew": "7:1s"}, "clock_skew"),
        ({"clock_skew": "1:soon"}, "1:-30s"),
        ({"silent": "1:every=10s"}, "for="),
        ({"silent": "1:every=10s,for=20s"}, "below every"),
        ({"silent": "1:every=10s,for=2s;1:every=9s,for=1s"}, "twice"),
        ({"future_share": 0.1, "future_s": 700.0}, "max_ahead_s"),
        ({"clock_skew": "1:1h"}, "max_ahead_s"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        load_settings(partitions=3, **settings)


def test_the_guard_is_off_where_the_event_clock_is_not_the_wall_clock() -> None:
    assert load_settings().guard_ms == 600_000
    assert load_settings(start_time_ms=1).guard_ms == 0
    assert load_settings(max_ahead_s=0, future_share=0.1, future_s=700).guard_ms == 0


LAST_MS = 253_402_300_799_999


@pytest.mark.parametrize(
    ("settings", "least_ms", "most_ms"),
    [
        ({}, 1, LAST_MS),
        ({"late_share": 0.1, "late_max_s": 60}, 60_001, LAST_MS),
        ({"late_max_s": 60, "disorder_share": 0.1, "disorder_s": 2.5}, 2_501, LAST_MS),
        ({"clock_skew": "1:-30s,2:500ms"}, 30_001, LAST_MS - 500),
        ({"clock_skew": "0:2s", "late_share": 0.1, "late_max_s": 1}, 1_001, LAST_MS - 2_000),
        ({"future_share": 0.1, "future_s": 86_400}, 1, LAST_MS - 86_400_000),
    ],
    ids=str,
)
def test_no_event_time_is_shifted_out_of_the_calendar_where_the_stream_starts(
    settings: dict[str, Any], least_ms: int, most_ms: int
) -> None:
    for start_ms, beyond_ms in ((least_ms, least_ms - 1), (most_ms, most_ms + 1)):
        load_settings(**settings, start_time_ms=start_ms)
        for faults in filter(None, (make_faults(load_settings(**settings), p) for p in range(4))):
            first, other = (
                faults.fates(0, 5_000, lambda _, count, at=at: np.full(count, at, np.int64)).times_ms
                for at in (start_ms, START_MS)
            )
            assert np.array_equal(first - start_ms, other - START_MS) and first.max() <= LAST_MS
        with pytest.raises(ConfigurationError, match="start_time_ms"):
            load_settings(**settings, start_time_ms=beyond_ms)


# -- the shard


def shard_of(partition: int, end: int | None = None) -> Shard:
    return Shard(MODELS[partition], SHARES[partition], (partition + 0.5) / 3, RatePlan(EPOCHS), end)


def test_a_silent_partition_sends_nothing_and_then_all_of_it() -> None:
    shard, now_ms, sent = shard_of(2), START_MS, 0
    while now_ms < START_MS + 60_000:
        count = shard.due_now(now_ms)
        silent = now_ms % 20_000 < 6_000
        if silent and sent:
            assert shard.take(count).timestamps_ms.size == 0 or now_ms % 20_000 < 10
            assert shard.next_due_ms() >= now_ms - now_ms % 20_000 + 6_000
        elif count:
            shard.take(count)
            sent += count
        now_ms += 100
    assert 1490 <= shard.next_index <= round(0.2 * (30 * 50 + 30 * 200))
    assert shard_of(2, 0).next_due_ms() == NEVER_MS


def test_what_a_shard_sends_is_what_is_regenerated() -> None:
    log = MemoryLog()
    for p in range(3):
        delivery = MemoryDelivery(log, p)
        assert delivery.open(1.0) is None
        shard, now_ms = shard_of(p), START_MS
        while now_ms < START_MS + 40_000:
            now_ms += 330
            delivery.send(shard.take(shard.due_now(now_ms)))
            delivery.commit(progress(p, shard.next_index))
        events = replays()[p].events(0, shard.next_index)
        assert log.ratings[p] == list(zip(encode_keys(events), encode_values(events), strict=True))
        again = shard_of(p)
        said = ShardProgress(**{**vars_of(progress(p, shard.next_index)), "event_time_ms": shard.last_event_ms})
        again.resume(Standing.of(MODELS[p], said, delivery.newest(100, 1.0)))
        assert (again.next_index, again.last_event_ms) == (shard.next_index, shard.last_event_ms)


def vars_of(record: ShardProgress) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ShardProgress.__slots__}


# -- those who check


@pytest.mark.parametrize("partition", [0, 1, 2])
def test_a_record_is_known_by_its_text_wherever_its_time_is(partition: int) -> None:
    replay = replays()[partition]
    events = replay.events(0, 2500)
    values = encode_values(events)
    assert events.faults is not None
    for n in range(0, 2500, 7):
        index = replay.index_of(values[n], n)
        if events.faults[n] >= Fault.UNKNOWN_FIELD:
            assert index is None
        else:
            assert index is not None and (index == n or values[index] == values[n])
    follower = Follower(replay, 0)
    assert [follower.index_of(value) for value in values] == list(range(2500))


def test_a_follower_that_begins_anywhere_passes_over_what_is_not_ours() -> None:
    replay = replays()[0]
    values = encode_values(replay.events(700, 300))
    values[50:50] = [b"not ours", None]
    follower = Follower(replay, None)
    found = [follower.index_of(value) for value in values]
    assert found[50] is None
    assert found[100:] == list(range(798, 1000))


def test_valid_records_are_counted_as_they_lie() -> None:
    replay = replays()[0]
    events = replay.events(0, 70_000)
    assert events.faults is not None and replay.valid is not None
    taken = ~replay.valid.rejects[events.faults]
    places = np.flatnonzero(taken)
    for valid in (1, 2, 999, 40_000, len(places)):
        assert replay.records_read(valid) == places[valid - 1] + 1
    assert replay.records_read(0) == 0
    assert (events.faults[~taken] >= Fault.FUTURE).all() and (events.faults[~taken] != Fault.UNKNOWN_FIELD).all()
    assert not ValidRecords(MODELS[0].faults, 0).rejects[Fault.FUTURE]  # type: ignore[arg-type]


def test_an_audit_agrees_with_what_was_sent_and_finds_what_was_not() -> None:
    events = replays()[0].events(0, 3000)
    keys, values = encode_keys(events), encode_values(events)
    audit = PartitionAudit(replays()[0], 3000)
    audit.take(list(keys), list(values), lambda n: n)
    assert audit.finish().agreed
    tombstone = values.index(None, 1000)
    audit = PartitionAudit(replays()[0], 3000)
    audit.take([*keys[:1500], *keys[1501:]], [*values[:1500], *values[1501:]], lambda n: n)
    assert audit.finish().counts["missing"] == 1
    audit = PartitionAudit(replays()[0], 3000)
    values[tombstone] = b"{}"
    audit.take(list(keys), list(values), lambda n: n)
    found = audit.finish()
    assert found.counts["altered"] + found.counts["foreign"] + found.counts["missing"] in (1, 2)


some_steps = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 250), st.integers(0, 150)), min_size=1, max_size=10)


@hypothesis_settings(max_examples=25, deadline=None)
@given(some_steps, st.sampled_from([0, 5_000, 20_000]), st.sampled_from([0, 600_000]))
def test_expected_windows_agree_with_the_reference_whatever_is_broken(
    steps: list[tuple[int, int, int]], delay_ms: int, guard_ms: int
) -> None:
    engine, shards, closed = ExpectedWindows(CATALOGUE, SPECS, delay_ms, 7), replays(guard_ms), {}
    batches, totals = [], [0, 0, 0]
    for batch, step in enumerate(steps):
        parts = [shards[p].valid_events(totals[p], step[p]) for p in range(3)]
        totals = [n + more for n, more in zip(totals, step, strict=True)]
        valid = {p: len(shards[p].valid_events(0, totals[p])) for p in range(3)}
        cut = Cut(batch, valid).in_records(shards)
        assert all(cut.read[p] <= totals[p] for p in range(3))
        engine.advance(cut, shards)
        closed.update(engine.close())
        batches.append(
            Ratings(
                np.concatenate([e.movie_ids for e in parts]),
                np.concatenate([e.half_stars for e in parts]) / 2,
                np.concatenate([e.timestamps_ms for e in parts]),
            )
        )
    found = {**closed, **{window: engine.record(window) for window in engine.open}}
    for kind, spec in enumerate(SPECS):
        truth = reference(batches, spec.size_ms, spec.slide_ms, delay_ms)
        assert {end - spec.size_ms for k, end in found if k == kind} == set(truth.windows)
        assert sum(n for (k, _), n in engine.late.items() if k == kind) == truth.late
        for start, window in truth.windows.items():
            record = found[kind, start + spec.size_ms]
            assert record["count"] == window.count and record["histogram"] == window.histogram()
            assert [(m["movieId"], m["count"], m["avg_rating"]) for m in record["movies"]] == window.top(7)


@hypothesis_settings(max_examples=30, deadline=None)
@given(some_steps, st.sampled_from([5_000, 60_000]), st.integers(2, 5))
def test_micro_batches_that_may_be_taken_together_make_the_same_windows(
    steps: list[tuple[int, int, int]], delay_ms: int, most: int
) -> None:
    one, many = (ExpectedWindows(CATALOGUE, SPECS, delay_ms, 7) for _ in range(2))
    shards, totals, cuts = replays(), [0, 0, 0], []
    for batch, step in enumerate(steps):
        totals = [n + more for n, more in zip(totals, step, strict=True)]
        cuts.append(Cut(batch, dict(enumerate(totals))))
    for cut in cuts:
        one.advance(cut, shards)
    while cuts:
        together = next(n for n in range(min(most, len(cuts)), 0, -1) if n == 1 or many.may_merge(cuts[:n], shards))
        many.advance_together(cuts[:together], shards)
        del cuts[:together]

    def told(engine: ExpectedWindows) -> Any:
        return [{**engine.record(window), "batch": 0} for window in engine.open], engine.late_total, engine.watermark

    assert told(one) == told(many)


def test_one_future_record_moves_the_watermark_only_without_a_guard() -> None:
    for guard_ms, moved in ((600_000, False), (0, True)):
        shards = replays(guard_ms)
        engine = ExpectedWindows(CATALOGUE, SPECS, 5_000, 7)
        for batch in range(5):
            engine.advance(Cut(batch, {0: 100 * (batch + 1)}), shards)
        assert (engine.watermark.newest_ms > START_MS + 86_000_000) is moved
        assert (engine.late_total[0] > 100) is moved


def test_what_was_sent_too_late_by_design_is_not_waited_for() -> None:
    oracle = Oracle(load_settings())
    config = SPOILT.digest(CATALOGUE.digest)
    run = {"run": "run", "config": config, "catalogue": CATALOGUE.digest, "settings": SPOILT.event_settings()}
    oracle.progress("run", run)
    windows = {"tumbling_s": 10, "sliding_s": 30, "slide_s": 10, "watermark_s": 5.0, "top_n": 7, "max_ahead_s": 600.0}
    oracle.progress("windows", windows)
    said = {p: replace(progress(p, 1500), share=build_user_map(SPOILT).share(p)) for p in range(3)}
    shards = {p: ShardReplay(MODELS[p], of, SPOILT.guard_ms) for p, of in said.items()}
    for p, of in said.items():
        sent = replace(of, event_time_ms=shards[p].due_ms(1499))
        oracle.progress(f"shard/{p}", json.loads(sent.to_json()))
    read = {p: len(shards[p].valid_events(0, 420)) for p in range(3)}
    for batch in range(3):
        oracle.cut({"batch": batch, "partitions": {str(p): {"valid": n, "next_offset": n} for p, n in read.items()}})
    final = [r for r in oracle.step(START_MS) if r["final"]]
    late = (shards[0].valid_events(420, 1_080).timestamps_ms < START_MS + 10_000).sum()
    assert final and late and not any(r["unread"] for r in final)


def test_a_prediction_finds_its_rating_whatever_its_time() -> None:
    replay = replays()[0]
    events = replay.events(0, 3000)
    assert events.faults is not None
    index, half_stars = find_ratings(replay, events.user_ids, events.movie_ids, events.timestamps_ms)
    own = np.flatnonzero((events.faults < Fault.UNKNOWN_FIELD) & (events.faults != Fault.DUPLICATE))
    same = index[own] == own
    assert same.mean() > 0.999 and (half_stars[own][same] == events.half_stars[own][same]).all()
    fates = replay.fates(0, 3000)
    repeats = np.flatnonzero(events.faults == Fault.DUPLICATE)
    assert fates is not None and (index[repeats] == fates.sources[repeats]).mean() > 0.99


def test_an_explanation_says_what_is_wrong_on_purpose() -> None:
    replay = replays()[1]
    kinds = replay.events(0, 3000).faults
    assert kinds is not None
    for fault in Fault:
        index = int(np.flatnonzero(kinds == fault)[5])
        found = explain(replay, index, SPOILT, CATALOGUE, SPECS)
        assert found["fault"]["kind"] == ("clock_skew" if fault is Fault.NONE else fault.name.lower())
        assert bool(found["windows"]) is not (fault >= Fault.MALFORMED or fault is Fault.FUTURE)
        if fault is Fault.DUPLICATE:
            source = explain(replay, found["fault"]["repeats"], SPOILT, CATALOGUE, SPECS)
            assert (source["value"], source["score"]) == (found["value"], found["score"])


def test_what_the_job_has_read_is_compared_while_ratings_flow() -> None:
    faults, replay = MODELS[0].faults, replays()[0]
    assert faults is not None
    check = ReadCheck(faults, SPOILT.guard_ms)
    said = json.loads(progress(0, 2000).to_json())
    for records in (1, 500, 1999, 2000):
        newest = replay.newest(0, records)
        newest_ms = newest[0] if newest else -1
        assert check.surplus(said, records, newest_ms) == 0
        if records == 1999:
            assert check.surplus(said, records - 300, newest_ms) < 0 < check.surplus(said, records + 300, newest_ms)
    later = replay.newest(0, 2600)
    assert later is not None and check.surplus(said, 2600, later[0]) is None


def test_models_of_all_settings_draw_the_same_ratings_whatever_is_broken() -> None:
    plain = build_models(load_settings(**PLAIN), CATALOGUE, [0])[0]
    assert isinstance(plain, ShardModel) and isinstance(SPOILT, Settings)
    one, other = plain.draw(0, 1000), MODELS[0].draw(0, 1000)
    assert (one.user_ids == other.user_ids).all() and (one.scores == other.scores).all()


# -- the answer key and the marks


def key_of(partition: int, count: int = 3000, first: int = 0) -> list[dict[str, Any]]:
    replay = replays()[partition]
    key = AnswerKey(replay, first)
    values = encode_values(replay.events(first, count))
    half = count // 3
    return [
        *key.take(values[:half], [2 * n + 5 for n in range(first, first + half)]),
        *key.take(values[half:], [2 * n + 5 for n in range(first + half, first + count)]),
    ]


@pytest.mark.parametrize("partition", [0, 1, 2])
def test_the_answer_key_names_every_case_with_its_place_and_nothing_else(partition: int) -> None:
    cases = key_of(partition)
    faults = replays()[partition].events(0, 3000).faults
    model = MODELS[partition]
    assert faults is not None and model.faults is not None
    for fault in Fault:
        named = [case["index"] for case in cases if case["kind"] == fault.name.lower()]
        assert named == np.flatnonzero(faults == fault).tolist() or fault is Fault.NONE
    assert [c["index"] for c in cases if c["kind"] == "dropped"] == model.faults.dropped(0, 3000).tolist()
    assert all(case["offset"] == 2 * case["index"] + 5 for case in cases)
    assert [c["shift_ms"] for c in cases if c["kind"] == "clock_skew"] == ([-4000] if partition == 1 else [])
    silent = [c for c in cases if c["kind"] == "silent"]
    assert all(c["to_ms"] - c["from_ms"] == 6000 for c in silent) and bool(silent) is (partition == 2)
    assert len({answer_key(case) for case in cases}) == len(cases)


def test_the_answer_key_is_the_same_wherever_a_successor_goes_on() -> None:
    whole = key_of(2, 2000)
    parts = [*key_of(2, 700), *key_of(2, 1300, first=700)]
    assert sorted(map(answer_key, parts)) == sorted(map(answer_key, whole))
    assert sorted(parts, key=answer_key) == sorted(whole, key=answer_key)


def test_the_answer_key_passes_over_records_of_others_and_repeats() -> None:
    replay = replays()[0]
    values = encode_values(replay.events(0, 400))
    key = AnswerKey(replay, 0)
    cases = key.take([*values[:200], b"rubbish", *values[150:]], list(range(451)))
    assert [c["index"] for c in cases if c["offset"] < 200] == [c["index"] for c in cases if c["index"] < 200]
    assert all(c["offset"] == c["index"] + 51 for c in cases if c["index"] >= 200)


def all_cases() -> list[dict[str, Any]]:
    return [case for p in range(3) for case in key_of(p)]


def stream() -> list[tuple[int, int, bytes | None]]:
    return [
        (p, 2 * n + 5, value) for p in range(3) for n, value in enumerate(encode_values(replays()[p].events(0, 3000)))
    ]


def test_a_perfect_rejecter_gets_full_marks_by_place_and_by_content() -> None:
    cases = all_cases()
    rejected = {(c["partition"], c["offset"]) for c in cases if c.get("rejected")}
    by_place = [json.dumps({"partition": p, "offset": o}).encode() for p, o in sorted(rejected)]
    found = grade_flagged("rejected", cases, by_place)
    assert (found.precision, found.recall, found.f1) == (1.0, 1.0, 1.0) and found.expected == len(rejected) > 900
    texts = [value for p, offset, value in stream() if (p, offset) in rejected and value is not None]
    found = grade_flagged("rejected", cases, texts)
    assert found.precision == 1.0 and found.false_negatives == sum(c["kind"] == "tombstone" for c in cases)
    only = grade_flagged("rejected", cases, by_place, "malformed")
    assert only.precision == only.recall == 1.0 and only.ignored and only.expected < found.expected


def test_marks_fall_with_every_mistake_and_name_it() -> None:
    cases = all_cases()
    places = [{"partition": c["partition"], "offset": c["offset"]} for c in cases if c.get("rejected")]
    wrong = [json.dumps(place).encode() for place in [*places[10:], {"partition": 0, "offset": 4}, places[20]]]
    found = grade_flagged("rejected", cases, wrong)
    assert (found.false_negatives, found.false_positives) == (10, 2)
    assert found.precision < 1 and found.recall < 1 and len(found.examples["false_negatives"]) == 5
    nothing = grade_flagged("rejected", cases, [])
    assert (nothing.precision, nothing.recall, nothing.f1) == (0.0, 0.0, 0.0)


PLACED = b'{"partition":0,"offset":5,"reason":"r"}'
RATED = b'{"userId":7,"movieId":5,"rating":3.0,"timestamp":1}'


@pytest.mark.parametrize(
    ("role", "records", "right", "too_many"),
    [
        ("rejected", [("0/5", PLACED), ("0/5", PLACED)], 1, 0),  # a micro-batch that ran again
        ("rejected", [("0/5", PLACED), ("0/6", PLACED[:-4] + b's"}'), ("0/5", PLACED)], 1, 1),
        ("rejected", [("0/5", PLACED), ("0/5", PLACED[:-4] + b's"}')], 1, 1),  # it says something else
        ("rejected", [("0/6", PLACED), ("0/6", PLACED)], 1, 1),  # keys that are no places of theirs
        ("rejected", [("7", PLACED), ("7", PLACED)], 1, 1),
        ("rejected", [(None, PLACED), (None, PLACED)], 1, 1),
        ("rejected", [("0/5", b"x"), ("0/5", b"x"), ("0/5", None), ("0/5", None)], 1, 3),
        ("deduplicated", [("7", RATED), ("7", RATED)], 1, 1),  # which is what is graded
    ],
)
def test_a_record_that_is_there_again_under_its_place_counts_once(
    role: str,
    records: list[tuple[str | None, bytes | None]],
    right: int,
    too_many: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = {"kind": "malformed", "partition": 0, "offset": 5, "rejected": True, "value": "x"}
    topics = {
        "theirs": [Record("theirs", 0, n, key, value, 0) for n, (key, value) in enumerate(records)],
        "ratings": [Record("ratings", 0, 4, "7", RATED, 0)],
    }
    monkeypatch.setattr(grading, "_cases", lambda *_: [case])
    monkeypatch.setattr(grading, "read_topic", lambda _, topic: iter(topics[topic]))
    marks = grading.grade(load_settings(), "", "theirs", role)
    assert (marks["true_positives"], marks["false_positives"], marks["false_negatives"]) == (right, too_many, 0)


def test_a_topic_of_late_ratings_is_graded_from_a_lateness_on() -> None:
    cases = all_cases()
    late = [c for c in cases if c["kind"] == "late" and c["lateness_ms"] >= 5000]
    values = [json.dumps(c["rating"]).encode() for c in late]
    found = grade_flagged("late", cases, values, lateness_ms=5000)
    assert found.precision == found.recall == 1.0 and found.expected == len(late) > 100
    little = [json.dumps(c["rating"]).encode() for c in cases if c["kind"] == "out_of_order"]
    assert grade_flagged("late", cases, [*values, *little], lateness_ms=5000).precision == 1.0
    kinds = replays()[0].events(0, 3000).faults
    assert kinds is not None
    honest = stream()[int(np.flatnonzero(kinds == Fault.NONE)[0])][2]
    assert grade_flagged("late", [c for c in cases if c["partition"] == 0], [honest]).false_positives == 1


def test_a_deduplicated_topic_must_hold_each_valid_rating_once() -> None:
    cases = all_cases()
    out = {(c["partition"], c["offset"]) for c in cases if c["kind"] == "duplicate" or c.get("rejected")}
    right = [value for p, offset, value in stream() if (p, offset) not in out]
    found = grade_deduplicated(cases, stream(), right)
    assert found.precision == found.recall == 1.0 and found.expected == len(right)
    raw = grade_deduplicated(cases, stream(), [value for _, _, value in stream()])
    assert raw.recall == 1.0 and raw.false_positives == len(out)
    less = grade_deduplicated(cases, stream(), right[100:])
    assert less.precision == 1.0 and 90 <= less.false_negatives <= 100


def test_a_partition_says_how_much_it_holds_though_its_last_records_say_nothing() -> None:
    replay = replays()[0]
    values = encode_values(replay.events(0, 2000))
    for end in [n + 1 for n, value in enumerate(values) if n > 300 and value is None][:4]:
        newest = values[:end][:-101:-1]
        for sent in (end, end - 40, end + 40):
            found = ShardSequence.of(MODELS[0], progress(0, sent)).held(newest)
            assert found == end


def test_a_partition_that_begins_with_broken_ratings_of_a_shard_is_known_to() -> None:
    values = encode_values(replays()[0].events(0, 1000))
    assert has_sent(MODELS[0], values) and not has_sent(MODELS[1], values)
    assert not has_sent(MODELS[0], values[500:])  # these may be somebody's copies
    assert not has_sent(MODELS[0], [])


def test_an_audit_counts_what_is_broken_on_purpose_as_right() -> None:
    events = replays()[2].events(0, 2000)
    audit = PartitionAudit(replays()[2], 2000)
    audit.take(list(encode_keys(events)), list(encode_values(events)), lambda n: n)
    found = audit.finish()
    assert found.agreed and events.faults is not None
    assert found.by_design == {f.name.lower(): int((events.faults == f).sum()) for f in Fault if f}


def test_health_compares_with_what_is_broken_in_mind() -> None:
    replay, digest = replays()[0], SPOILT.digest(CATALOGUE.digest)
    newest = replay.newest(0, 1500)
    assert newest is not None
    for missing, disagrees in ((0, False), (250, True)):
        store = MetricsStore(("tumbling_10s",))
        run = {"run": "r", "config": digest, "settings": SPOILT.event_settings()}
        store.progress("run", run, START_MS)
        store.progress("windows", {"max_ahead_s": 600.0}, START_MS)
        said = json.loads(progress(0, 2000).to_json())
        store.progress("shard/0", said, START_MS)
        read = {"0": {"records": 1500 - missing, "next_offset": 1500, "max_event_ms": newest[0]}}
        store.job({"state": "running", "batch": 3, "updated_ms": START_MS, "partitions": read}, START_MS)
        reasons = store.health(START_MS + 11_000).reasons
        assert any("have not been read" in reason for reason in reasons) is disagrees, reasons
