"""Regenerated ratings, what the windows must hold, and verdicts on what they do hold."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ray_pipeline.config import load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.errors import StateMismatchError
from ray_pipeline.generator.plan import ShardSchedule
from ray_pipeline.metrics.verdicts import Verdicts
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_user_map
from ray_pipeline.truth.oracle import Oracle, expected_key
from ray_pipeline.truth.outside import OutsideRatings
from ray_pipeline.truth.replay import ShardReplay, build_models, published_settings
from ray_pipeline.truth.verdict import Verdict, compare, diagnose, judge
from ray_pipeline.truth.windows import Cut, ExpectedWindows
from ray_pipeline.windows.reference import Ratings, reference
from ray_pipeline.windows.spec import Panes, epoch_ms, iso_ms, window_specs

START_MS = 1_700_000_040_000
SETTINGS = load_settings(
    users=300, movies=120, partitions=3, actors=1, tumbling_s=10, sliding_s=30, slide_s=10, top_n=7
)
CATALOGUE = load_catalogue(SETTINGS)
MODELS = build_models(SETTINGS, CATALOGUE, range(3))
SPECS = window_specs(SETTINGS)
GENRES = {int(m): CATALOGUE.genres[n] for n, m in enumerate(CATALOGUE.movie_ids)}
EPOCHS = (
    Epoch(START_MS, 50.0),
    Epoch(START_MS + 30_000, 200.0),
    Epoch(START_MS + 60_000, 0.0),
    Epoch(START_MS + 65_000, 20.0),
)


def progress(partition: int, next_index: int = 10**9) -> ShardProgress:
    config = SETTINGS.digest(CATALOGUE.digest)
    phase = (partition + 0.5) / 3
    return ShardProgress(
        "run", config, partition, next_index, START_MS, START_MS, EPOCHS, (0.5, 0.3, 0.2)[partition], phase
    )


def told(partition: int, next_index: int) -> ShardProgress:
    """What a shard of the run says when it has sent so many ratings."""
    found = replace(progress(partition, next_index), share=build_user_map(SETTINGS).share(partition))
    last_ms = int(ShardSchedule.lived(found).due_ms(next_index - 1, 1)[0])
    return replace(found, event_time_ms=last_ms)


def replays() -> dict[int, ShardReplay]:
    return {p: ShardReplay(MODELS[p], progress(p)) for p in range(3)}


# -- replay


@pytest.mark.parametrize("partition", [0, 1, 2])
def test_what_is_due_at_a_millisecond_is_found_again(partition: int) -> None:
    replay = replays()[partition]
    times = replay.events(0, 4000).timestamps_ms
    for at in (*times[[0, 1, 77, 2000, 3999]].tolist(), START_MS - 5, START_MS + 62_000):
        assert list(replay.at(at)) == np.flatnonzero(times == at).tolist()
        assert replay.count_before(at) == int((times < at).sum())


def test_settings_come_from_what_the_run_published() -> None:
    config = SETTINGS.digest(CATALOGUE.digest)
    run = {"run": "r", "config": config, "catalogue": CATALOGUE.digest, "settings": SETTINGS.event_settings()}
    found = published_settings(load_settings(), run, CATALOGUE)
    assert found.event_settings() == SETTINGS.event_settings()
    with pytest.raises(StateMismatchError, match="--catalog"):
        published_settings(load_settings(), {**run, "catalogue": "other"}, load_catalogue(load_settings(movies=90)))


# -- windows


def cuts_of(steps: list[tuple[int, int, int]]) -> list[Cut]:
    """(ratings of partition 0, 1, 2) by micro-batch → cuts."""
    totals, cuts = [0, 0, 0], []
    for batch, step in enumerate(steps):
        totals = [n + more for n, more in zip(totals, step, strict=True)]
        cuts.append(Cut(batch, dict(enumerate(totals))))
    return cuts


some_steps = st.lists(st.tuples(st.integers(0, 900), st.integers(0, 500), st.integers(0, 400)), min_size=1, max_size=12)


@hypothesis_settings(max_examples=40)
@given(some_steps, st.sampled_from([0, 5_000, 20_000]))
def test_expected_windows_agree_with_the_reference_late_ratings_included(
    steps: list[tuple[int, int, int]], delay_ms: int
) -> None:
    engine, shards, closed = ExpectedWindows(CATALOGUE, SPECS, delay_ms, 7), replays(), {}
    batches, before = [], {0: 0, 1: 0, 2: 0}
    for cut in cuts_of(steps):
        engine.advance(cut, shards)
        closed.update(engine.close())
        parts = [shards[p].events(before[p], cut.read[p] - before[p]) for p in range(3)]
        batches.append(
            Ratings(
                np.concatenate([e.movie_ids for e in parts]),
                np.concatenate([e.half_stars for e in parts]) / 2,
                np.concatenate([e.timestamps_ms for e in parts]),
            )
        )
        before = dict(cut.read)
    found = {**closed, **{window: engine.record(window) for window in engine.open}}
    for kind, spec in enumerate(SPECS):
        truth = reference(batches, spec.size_ms, spec.slide_ms, delay_ms)
        assert {end - spec.size_ms for k, end in found if k == kind} == set(truth.windows)
        assert sum(n for (k, _), n in engine.late.items() if k == kind) == truth.late
        for start, window in truth.windows.items():
            record = found[kind, start + spec.size_ms]
            assert (record["window_type"], record["window_start"]) == (spec.name, iso_ms(start))
            assert (record["count"], record["avg_rating"]) == (window.count, window.avg_rating)
            assert (record["p50"], record["p95"]) == (window.percentile(0.5), window.percentile(0.95))
            assert record["histogram"] == window.histogram()
            assert [(m["movieId"], m["count"], m["avg_rating"]) for m in record["movies"]] == window.top(7)
            assert [(g["genre"], g["count"], g["avg_rating"]) for g in record["genres"]] == window.by_genre(GENRES)
            assert sum(record["partitions"].values()) == window.count


def test_a_successor_that_begins_later_finds_the_same_windows() -> None:
    steps = [(300, 180, 120)] * 8
    whole, late = (
        ExpectedWindows(CATALOGUE, SPECS, 5_000, 7),
        ExpectedWindows(CATALOGUE, SPECS, 5_000, 7, from_ms=START_MS + 20_000),
    )
    for cut in cuts_of(steps):
        whole.advance(cut, replays())
        late.advance(cut, replays())
    kept = [window for window in whole.open if window[1] > START_MS + 20_000]
    assert kept and late.open == kept
    assert [late.record(window) for window in kept] == [whole.record(window) for window in kept]


@hypothesis_settings(max_examples=40)
@given(
    some_steps,
    st.sampled_from([5_000, 20_000]),
    st.integers(2, 5),
    st.dictionaries(st.integers(0, 11), st.sampled_from([2, 12])),
)
@example([(30, 20, 10)] * 2, 20_000, 2, {1: 2})
def test_micro_batches_that_may_be_taken_together_make_the_same_windows(
    steps: list[tuple[int, int, int]], delay_ms: int, most: int, top_n: dict[int, int]
) -> None:
    one, many = (ExpectedWindows(CATALOGUE, SPECS, delay_ms, 7) for _ in range(2))
    shards, cuts = replays(), cuts_of(steps)
    for batch in top_n.keys() & set(range(len(cuts))):  # a job that was started again says so
        cuts[batch] = replace(cuts[batch], windows={"top_n": top_n[batch]})
    for cut in cuts:
        one.advance(cut, shards)
    while cuts:
        together = next(n for n in range(min(most, len(cuts)), 0, -1) if n == 1 or many.may_merge(cuts[:n], shards))
        many.advance_together(cuts[:together], shards)
        del cuts[:together]

    def told(engine: ExpectedWindows) -> Any:
        return [{**engine.record(window), "batch": 0} for window in engine.open], engine.late_total, engine.watermark

    assert told(one) == told(many)


SPAN = re.compile(r"(\d+)(ms|s|min|h|d)")
UNITS = {"ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


@hypothesis_settings(max_examples=80)
@given(
    st.integers(START_MS, START_MS + 10**12),
    st.sampled_from([(1, 1, 1), (10, 30, 10), (60, 300, 60), (90, 3_600, 45)]),
    st.integers(0, 119),
)
def test_what_oracle_and_job_take_from_one_place_agrees_with_arithmetic_of_its_own(
    at_ms: int, lengths_s: tuple[int, int, int], movie: int
) -> None:
    tumbling_s, sliding_s, slide_s = lengths_s
    specs = window_specs(
        SETTINGS.model_copy(update={"tumbling_s": tumbling_s, "sliding_s": sliding_s, "slide_s": slide_s})
    )
    must = {
        (size_s, start_s * 1000)
        for size_s, every_s in ((tumbling_s, tumbling_s), (sliding_s, slide_s))
        for start_s in range(at_ms // 1000 - size_s - 1, at_ms // 1000 + 2)
        if start_s % every_s == 0 and start_s * 1000 <= at_ms < (start_s + size_s) * 1000
    }
    outside, movie_id = OutsideRatings(), int(CATALOGUE.movie_ids[movie])
    outside.add({"partition": 0, "offset": 0, "userId": 9, "movieId": movie_id, "rating": 4.5, "timestamp": at_ms})
    engine = ExpectedWindows(CATALOGUE, specs, 5_000, 7, outside=outside)
    engine.advance(Cut(0, {}, {0: 1}), {})
    records = [engine.record(window) for window in engine.open]
    for record in records:
        start, end = (datetime.fromisoformat(record[name]) for name in ("window_start", "window_end"))
        size_s = round((end - start).total_seconds())
        assert (size_s, round(start.timestamp() * 1000)) in must
        spans = [int(n) * UNITS[unit] for n, unit in SPAN.findall(record["window_type"])]
        assert spans == (
            [size_s * 1000] if record["window_type"].startswith("tumbling") else [sliding_s * 1000, slide_s * 1000]
        )
        assert [row["genre"] for row in record["genres"]] == sorted(CATALOGUE.genres[movie])
        assert [row["movieId"] for row in record["movies"]] == [movie_id]
    assert len(records) == len(must)
    pane_ms = Panes(specs).size_ms
    of_job = {
        (specs[kind].size_ms // 1000, end - specs[kind].size_ms)
        for kind, end in Panes(specs).windows_of(at_ms // pane_ms * pane_ms)
    }
    assert of_job == must


# -- the oracle


def batch_record(cut: Cut) -> dict[str, Any]:
    return {"batch": cut.batch, "partitions": {str(p): {"valid": n, "next_offset": n} for p, n in cut.read.items()}}


def run_record() -> dict[str, Any]:
    config = SETTINGS.digest(CATALOGUE.digest)
    return {"run": "run", "config": config, "catalogue": CATALOGUE.digest, "settings": SETTINGS.event_settings()}


def windows_record(watermark_s: float = 5.0) -> dict[str, Any]:
    return {"tumbling_s": 10, "sliding_s": 30, "slide_s": 10, "watermark_s": watermark_s, "top_n": 7}


def oracle_with(sent: tuple[int, int, int], watermark_s: float = 5.0) -> Oracle:
    oracle = Oracle(load_settings())
    oracle.progress("run", run_record())
    oracle.progress("windows", windows_record(watermark_s))
    for p, n in enumerate(sent):
        oracle.progress(f"shard/{p}", vars_of(told(p, n)))
    return oracle


def vars_of(record: ShardProgress) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(record.to_json())
    return found


def newest(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {expected_key(record): record for record in records}


def test_the_oracle_waits_until_the_shards_have_said_that_they_sent_what_the_job_has_read() -> None:
    oracle = oracle_with((100, 60, 40))
    oracle.cut(batch_record(Cut(0, {0: 300, 1: 180, 2: 120})))
    assert oracle.step(START_MS) == [] and oracle.behind == 1
    for p, n in enumerate((300, 180, 120)):
        oracle.progress(f"shard/{p}", vars_of(told(p, n)))
    found = newest(oracle.step(START_MS + 1_000))
    assert oracle.batch == 0 and sum(r["count"] for k, r in found.items() if k.startswith("tumbling")) == 600


def test_the_oracle_does_not_wait_for_ever_for_records_that_nobody_sent() -> None:
    oracle = oracle_with((300, 180, 120))
    oracle.cut(batch_record(Cut(0, {0: 307, 1: 180, 2: 120})))
    assert oracle.step(START_MS) == []
    found = newest(oracle.step(START_MS + 6_000))
    assert sum(r["count"] for k, r in found.items() if k.startswith("tumbling")) == 600


def test_a_micro_batch_that_ran_twice_counts_once_and_a_query_from_the_beginning_counts_anew() -> None:
    oracle = oracle_with((900, 540, 360))
    first, second = Cut(0, {0: 300, 1: 180, 2: 120}), Cut(1, {0: 600, 1: 360, 2: 240})
    for cut in (first, first, second, second):
        oracle.cut(batch_record(cut))
    found = newest(oracle.step(START_MS + 2_000))
    assert sum(r["count"] for k, r in found.items() if k.startswith("tumbling")) == 1200
    oracle.cut(batch_record(first))
    again = newest(oracle.step(START_MS + 4_000))
    assert sum(r["count"] for k, r in again.items() if k.startswith("tumbling")) == 600
    oracle.cut(batch_record(Cut(0, {0: 900, 1: 540, 2: 360})))  # with a fresh checkpoint, all that is there at once
    fresh = newest(oracle.step(START_MS + 6_000))
    assert sum(r["count"] for k, r in fresh.items() if k.startswith("tumbling")) == 1800


def test_what_was_sent_and_not_read_of_a_final_window_is_named() -> None:
    oracle = oracle_with((900, 540, 360))
    for cut in cuts_of([(300, 180, 0), (300, 180, 0), (300, 180, 0)]):  # partition 2 is never read
        oracle.cut(batch_record(cut))
    found = newest(oracle.step(START_MS + 40_000))
    final = [r for r in found.values() if r["final"] and r["window_type"] == "tumbling_10s"]
    assert final and all(set(r["unread_partitions"]) == {"2"} and r["unread"] > 0 for r in final)
    oracle.cut(batch_record(Cut(3, {0: 900, 1: 540, 2: 360})))  # and now it is: too late
    window = newest(oracle.step(START_MS + 42_000))[expected_key(final[0])]
    assert (window["unread"], window["late"]) == (0, final[0]["unread"])


@pytest.mark.parametrize(
    ("changes", "read", "again"),
    [
        ({}, 300, True),
        ({"top_n": 12}, 300, True),
        ({"tumbling_s": 20}, 300, False),
        ({"sliding_s": 60}, 300, False),
        ({"slide_s": 5}, 300, False),
        ({"watermark_s": 9.0}, 300, False),
        ({"max_ahead_s": 9.0}, 300, True),  # of a guard that turned nothing away
        ({"max_ahead_s": 9.0}, 290, False),
    ],
)
def test_a_micro_batch_ran_again_whatever_has_changed_that_nothing_is_counted_by(
    changes: dict[str, Any], read: int, again: bool
) -> None:
    first = Cut(3, {0: 300}, {0: 310}, {**windows_record(), "max_ahead_s": 60.0})
    other = Cut(3, {0: read}, {0: 310}, {**windows_record(), "max_ahead_s": 60.0, **changes})
    assert (other.again(first), other.anew(first)) == (again, not again)


@hypothesis_settings(max_examples=40)
@given(some_steps, st.data())
def test_each_window_has_as_many_movies_as_were_asked_for_when_it_last_changed(
    steps: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    cuts, whole = cuts_of(steps), ExpectedWindows(CATALOGUE, SPECS, 5_000, len(CATALOGUE))
    sent = (max(1, cuts[-1].read[0]), max(1, cuts[-1].read[1]), max(1, cuts[-1].read[2]))
    shards = {p: ShardReplay(MODELS[p], told(p, n)) for p, n in enumerate(sent)}
    oracle, now_ms = oracle_with(sent), START_MS
    found: dict[str, dict[str, Any]] = {}
    top_n, must = 7, {}
    for cut in cuts:
        asked = data.draw(st.lists(st.sampled_from([2, 7, 12]), max_size=2))  # by jobs started since the cut before
        for n, said in enumerate(asked or [None]):
            windows = {"windows": {**windows_record(), "top_n": said}} if said else {}
            oracle.cut({**batch_record(cut), **windows})
            if data.draw(st.booleans()) or n + 1 < len(asked):
                now_ms += data.draw(st.sampled_from([0, 2_000]))
                found.update(newest(oracle.step(now_ms)))
        top_n = asked[-1] if asked else top_n
        whole.advance(cut, shards)
        records = [whole.record(window) for window in whole.changed() if window in whole.open]
        must.update({expected_key(r): {**r, "movies": r["movies"][:top_n]} for r in records})
        whole.close()
    found.update(newest(oracle.step(now_ms + 2_000)))
    assert {key: (r["batch"], r["count"], r["movies"]) for key, r in found.items()} == {
        key: (r["batch"], r["count"], r["movies"]) for key, r in must.items()
    }


# -- verdicts

EXPECTED = {
    "window_start": iso_ms(START_MS),
    "window_end": iso_ms(START_MS + 10_000),
    "window_type": "tumbling_10s",
    "count": 5,
    "avg_rating": 3.2,
    "p50": 3.0,
    "p95": 5.0,
    "histogram": [0, 1, 0, 0, 0, 2, 1, 0, 0, 1],
    "movies": [{"movieId": 4, "count": 3, "avg_rating": 3.0}, {"movieId": 9, "count": 2, "avg_rating": 3.5}],
    "genres": [{"genre": "Drama", "count": 5, "avg_rating": 3.2}],
    "partitions": {"0": 3, "1": 2},
    "late": 0,
    "unread": 0,
    "unread_partitions": {},
    "batch": 7,
    "final": True,
    "final_ms": START_MS,
    "updated_ms": START_MS,
}
LATER_MS = START_MS + 60_000


def actual_of(expected: dict[str, Any]) -> dict[str, dict[str, Any]]:
    head = {n: expected[n] for n in ("window_start", "window_end", "window_type", "count", "avg_rating", "batch")}
    return copy.deepcopy(
        {
            "total": {**head, **{n: expected[n] for n in ("p50", "p95", "histogram")}},
            "topn": {**head, "movies": expected["movies"]},
            "genres": {**head, "genres": expected["genres"]},
        }
    )


def test_a_window_that_agrees_is_verified_and_one_with_late_ratings_is_late_by_design() -> None:
    assert judge(EXPECTED, actual_of(EXPECTED), LATER_MS).verdict is Verdict.VERIFIED
    late = judge({**EXPECTED, "late": 3}, actual_of(EXPECTED), LATER_MS)
    assert late.verdict is Verdict.LATE and "3 ratings came too late" in late.reason


CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("count", lambda a: a["total"].update(count=4), "holds 4 ratings, 5 are expected: 1 too few"),
    ("more", lambda a: a["total"].update(count=8), "3 too many"),
    ("histogram", lambda a: a["total"].update(histogram=[0, 1, 0, 0, 0, 3, 0, 0, 0, 1]), "the histogram is"),
    ("mean", lambda a: a["total"].update(avg_rating=3.1), "the mean is 3.1, 3.2 is expected"),
    ("p95", lambda a: a["total"].update(p95=4.5), "95th percentile"),
    ("end", lambda a: a["total"].update(window_end=iso_ms(START_MS + 3_000)), "the end is"),
    ("top", lambda a: a["topn"]["movies"].reverse(), "movie 1 is 9 with 2 ratings"),
    ("top mean", lambda a: a["topn"]["movies"][1].update(avg_rating=1.0), "movie 2 is 9"),
    ("shorter top", lambda a: a["topn"]["movies"].pop(), "1 movie rows are there, 2 are expected"),
    ("genre", lambda a: a["genres"]["genres"][0].update(count=6), "genre 1 is Drama with 6"),
    ("nothing", lambda a: a.clear(), "there is no total record"),
]


@pytest.mark.parametrize(("change", "reason"), [(c, r) for _, c, r in CHANGES], ids=[n for n, _, _ in CHANGES])
def test_each_difference_of_a_final_window_is_wrong_and_named(change: Callable[[Any], Any], reason: str) -> None:
    actual = actual_of(EXPECTED)
    change(actual)
    found = judge(EXPECTED, actual, LATER_MS)
    assert found.verdict is Verdict.WRONG and reason in found.reason
    assert judge(EXPECTED, actual, START_MS + 1_000).verdict is Verdict.PENDING  # its record may be on its way


def test_an_open_window_is_pending_and_wrong_when_it_differs_at_the_same_micro_batch() -> None:
    still_open = {**EXPECTED, "final": False, "final_ms": None}
    assert judge(still_open, actual_of(EXPECTED), LATER_MS).reason == "still open, agrees so far"
    actual = actual_of(EXPECTED)
    actual["total"].update(count=4, batch=6)  # one micro-batch behind
    found = judge(still_open, actual, LATER_MS)
    assert (found.verdict, found.difference) == (Verdict.PENDING, None)  # nothing that can be told yet
    actual["total"].update(batch=7)
    assert judge(still_open, actual, LATER_MS).verdict is Verdict.WRONG


def test_unread_ratings_make_a_final_window_wrong() -> None:
    unread = {**EXPECTED, "unread": 4, "unread_partitions": {"1": 4}}
    found = judge(unread, actual_of(EXPECTED), LATER_MS)
    assert found.verdict is Verdict.WRONG and "4 of partition 1" in found.reason
    assert judge(unread, actual_of(EXPECTED), START_MS + 1_000).verdict is Verdict.PENDING


def test_compare_finds_nothing_where_there_is_nothing() -> None:
    assert compare(EXPECTED, actual_of(EXPECTED)) == ""


def test_known_ways_to_be_wrong_are_recognised() -> None:
    types = {"tumbling_10s": 10_000, "sliding_30s_10s": 30_000}
    wide = {**EXPECTED, "window_type": "sliding_30s_10s", "window_end": iso_ms(START_MS + 30_000), "count": 12}
    wide["histogram"], wide["partitions"] = [0, 1, 1, 0, 2, 3, 2, 1, 1, 1], {"0": 8, "1": 4}
    parts = {
        START_MS: EXPECTED,
        START_MS + 10_000: {**EXPECTED, "count": 4},
        START_MS + 20_000: {**EXPECTED, "count": 3},
    }

    def at(window_type: str, start_ms: int) -> dict[str, Any] | None:
        return parts.get(start_ms) if window_type == "tumbling_10s" else wide

    def said(**changes: Any) -> str:
        actual = actual_of(wide)
        actual["total"].update(changes)
        return diagnose(wide, actual, at, 30_000, START_MS, types)

    assert said(count=5, histogram=EXPECTED["histogram"]) == "it holds what tumbling_10s must hold"
    assert said(count=9, histogram=[9] + [0] * 9) == "it spans 20 s instead of 30 s"
    assert said(count=4, histogram=[4] + [0] * 9) == "partition 0 is not in it"
    assert (
        said(histogram=[0, 2, 0, 2, 0, 5, 0, 2, 0, 1])
        == "it holds whole stars only: ratings were read as whole numbers"
    )
    assert said() == "the totals are right: the order or the counts within the window are not"
    assert "not too late" in said(count=11, histogram=[11] + [0] * 9)
    assert "counted twice" in said(count=40, histogram=[40] + [0] * 9)
    assert diagnose(wide, {}, at, 30_000, START_MS, types).startswith("the window was never written")
    assert epoch_ms(iso_ms(START_MS)) == START_MS


# -- every window beside what it must hold


def window_pair(n: int, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    start = START_MS + n * 10_000
    expected = {**EXPECTED, "window_start": iso_ms(start), "window_end": iso_ms(start + 10_000), **changes}
    return expected, [{**record, "kind": kind} for kind, record in actual_of(expected).items()]


def filled_verdicts(count: int) -> Verdicts:
    verdicts = Verdicts()
    for n in range(count):
        expected, records = window_pair(n)
        verdicts.expect(expected)
        for record in records:
            verdicts.actual(record)
    return verdicts


def test_windows_are_counted_by_verdict_and_the_first_wrong_one_is_named() -> None:
    verdicts = filled_verdicts(3)
    late, records = window_pair(3, late=2)
    verdicts.expect(late)
    for record in records:
        verdicts.actual(record)
    verdicts.expect(window_pair(4)[0])  # never written
    early = verdicts.tally(START_MS + 1_000)
    assert (early.verified, early.late, early.pending, early.wrong) == (3, 1, 1, 0)
    found = verdicts.tally(LATER_MS)
    assert (found.verified, found.late, found.pending, found.wrong) == (3, 1, 0, 1)
    assert (
        "tumbling_10s from " + iso_ms(START_MS + 40_000) in found.first_wrong and "never written" in found.first_wrong
    )
    assert verdicts.wrong(LATER_MS)[0]["difference"] == -5
    assert verdicts.of("tumbling_10s", START_MS, LATER_MS)["verdict"] == "verified"
    assert verdicts.of("tumbling_10s", START_MS + 900_000, LATER_MS)["reason"] == "not computed yet"


def test_a_settled_window_is_forgotten_but_for_a_digest_which_still_shows_an_alteration() -> None:
    verdicts = filled_verdicts(450)
    assert verdicts.tally(LATER_MS).verified == 450
    expected, records = window_pair(0)
    for record in records:  # the same again
        verdicts.actual(record)
    verdicts.expect(expected)  # an oracle that began again
    assert verdicts.tally(LATER_MS).verified == 450
    for record in records:
        verdicts.actual({**record, "count": 4} if record["kind"] == "total" else record)
    found = verdicts.tally(LATER_MS)
    assert (found.verified, found.wrong) == (449, 1) and "altered after it had been verified" in found.first_wrong


def test_an_open_window_that_differs_at_the_same_micro_batch_counts_as_wrong() -> None:
    verdicts = Verdicts()
    expected, records = window_pair(0, final=False, final_ms=None)
    verdicts.expect(expected)
    for record in records:
        verdicts.actual({**record, "count": 4} if record["kind"] == "total" else record)
    found = verdicts.tally(LATER_MS)
    assert (found.wrong, found.pending) == (1, 0)
