"""Rates, latency, health and the store."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_pipeline.delivery.interface import Epoch
from ray_pipeline.generator.arrivals import poisson_arrivals
from ray_pipeline.generator.plan import RatePlan, ShardSchedule
from ray_pipeline.metrics import store as store_module
from ray_pipeline.metrics.expected import surplus
from ray_pipeline.metrics.health import Evidence, assess
from ray_pipeline.metrics.latency import LatencyMeter
from ray_pipeline.metrics.rate import RateMeter
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.metrics.verdicts import Tally
from ray_pipeline.windows.spec import epoch_ms, iso_ms

NOW = 1_700_000_000_000
TUMBLING, SLIDING = "tumbling_1min", "sliding_5min_1min"


@pytest.mark.parametrize("per_second", [0.2, 5.0, 100.0, 50_000.0])
def test_the_rate_is_that_at_which_the_total_grows(per_second: float) -> None:
    meter = RateMeter()
    for step in range(1200):
        meter.add(NOW + step * 100, int(per_second * step / 10))
    assert meter.rate(NOW + 119_900) == pytest.approx(per_second, rel=0.1)
    assert meter.last_minute(NOW + 119_900) == pytest.approx(per_second * 60, rel=0.1)


def test_a_change_shows_within_two_seconds_and_a_pause_too() -> None:
    meter, total = RateMeter(), 0
    for step in range(100):
        total += 10
        meter.add(NOW + step * 100, total)
    for step in range(100, 121):
        total += 50
        meter.add(NOW + step * 100, total)
    assert meter.rate(NOW + 12_000) == pytest.approx(500, rel=0.05)
    assert meter.rate(NOW + 12_000 + 2_000) == 0.0  # nothing came since


def test_late_news_are_no_silence_and_old_ones_no_rate() -> None:
    busy, begins = RateMeter(), RateMeter()
    for step in range(100):
        busy.add(NOW + step * 1000, step * 500, NOW + step * 1000 + 4_000)
        begins.add(NOW + step * 1000, step * 500, NOW + 200_000)  # a feed that begins reads what was long ago
    assert busy.rate(NOW + 99_000 + 4_500) == pytest.approx(500)
    assert busy.rate(NOW + 99_000 + 6_000) == 0.0
    assert begins.rate(NOW + 200_000) == 0.0


def said(records: int, newest_ms: int) -> dict[str, dict[str, int]]:
    return {"0": {"records": records, "max_event_ms": newest_ms}}


def test_latency_is_measured_from_the_intended_time() -> None:
    meter = LatencyMeter()
    meter.add(said(0, NOW), NOW + 100, 0, live=False)
    for step in range(1, 101):  # a batch of 20 ratings every 200 ms, read 300 ms after its last one
        meter.add(said(20 * step, NOW + 200 * step), NOW + 200 * step + 300, 0, live=True)
    p50, p95 = meter.percentiles(NOW + 20_300) or (0, 0)
    assert p50 == pytest.approx(400, abs=20) and p95 == pytest.approx(490, abs=20)
    assert meter.percentiles(NOW + 120_000) is None
    shifted = LatencyMeter()
    shifted.add(said(0, 0), NOW, -NOW, live=True)
    shifted.add(said(10, 1000), NOW + 1200, -NOW, live=True)
    assert (shifted.percentiles(NOW + 1200) or (0,))[0] < 1_300


STREAMS = {
    "a pause": [Epoch(NOW, 50.0), Epoch(NOW + 60_000, 0.0), Epoch(NOW + 660_000, 50.0)],
    "a burst": [Epoch(NOW, 0.2), Epoch(NOW + 660_000, 5_000.0)],
    "a plan": [Epoch(NOW, 0.0, "50 for 1m then 0 for 10m then 50", NOW)],
}


@pytest.mark.parametrize("epochs", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("seed", [None, 42], ids=["regular", "random"])
def test_latency_after_a_pause_is_that_of_the_ratings_and_not_of_the_pause(
    epochs: list[Epoch], seed: int | None
) -> None:
    store, schedule = MetricsStore((TUMBLING,)), ShardSchedule(RatePlan(epochs), 0.25, 0.5, poisson_arrivals(seed, 0))
    read = 0
    for at_ms in [*range(NOW + 1_000, NOW + 62_000, 1_000), *range(NOW + 661_000, NOW + 690_000, 1_000)]:
        sent = schedule.count_due(at_ms)
        if sent == read:
            continue
        read, newest_ms = sent, int(schedule.due_ms(sent - 1, 1)[0])
        said = {"epochs": [epoch.to_record() for epoch in epochs], "share": 0.25, "phase": 0.5, "poisson_seed": seed}
        progress = {**said, "partition": 0, "next_index": sent, "event_time_ms": newest_ms, "committed_ms": at_ms}
        store.progress("shard/0", progress, at_ms)
        partitions = {"0": {"records": read, "next_offset": read, "max_event_ms": newest_ms}}
        store.job(job(batch=at_ms, updated_ms=at_ms + 400, partitions=partitions), at_ms + 400)
        latency = store.latency_ms(at_ms + 400)
        assert latency is None or 0 < latency["p50"] <= latency["p99"] <= 1_401, (at_ms - NOW, latency)
    assert store.latency_ms(NOW + 690_000) is not None


def test_ratings_that_no_shard_has_told_of_yet_are_in_no_latency() -> None:
    store = MetricsStore((TUMBLING,))
    for sent, read in ((100, 100), (100, 140), (160, 160)):
        store.progress("shard/0", shard_progress(sent), NOW)
        partitions = {
            "0": {"records": read, "next_offset": read, "max_event_ms": shard_progress(read)["event_time_ms"]}
        }
        store.job(job(batch=read, partitions=partitions), NOW)
        assert (store.latency_ms(NOW) is None) == (read < 160)


def job(**changes: Any) -> dict[str, Any]:
    return {
        "state": "running",
        "batch": 3,
        "updated_ms": NOW,
        "partitions": {"0": {"records": 100, "next_offset": 100, "max_event_ms": NOW}},
        "executors": 1,
        "executors_wanted": 1,
        "lag": 0,
        "watermark_ms": NOW - 60_000,
        **changes,
    }


def generator(**changes: Any) -> dict[str, Any]:
    actors = [{"actor": 0, "alive": True, "partitions": [0], "restarts": 0}]
    return {"state": "running", "updated_ms": NOW, "behind_s": 0.0, "actors": actors, **changes}


def evidence(**changes: Any) -> Evidence:
    fields: dict[str, Any] = {
        "kafka_connected": True,
        "generator": generator(),
        "job": job(),
        "surplus": {},
        "disagreeing_since_ms": None,
        "delivered_rate": 100.0,
        "now_ms": NOW,
        "oracle": {"state": "running", "batch": 5, "updated_ms": NOW},
        "windows": Tally(10, 2, 0, 0, ""),
        "scores": {"state": "running", "reason": ""},
    }
    return Evidence(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({}, "healthy", None),
        ({"job": {}, "generator": {}}, "starting", "no data yet"),
        ({"kafka_connected": False}, "unhealthy", "no Kafka broker"),
        ({"generator": generator(state="failed")}, "unhealthy", "generator failed"),
        ({"job": job(state="failed", reason="wiped")}, "unhealthy", "wiped"),
        ({"job": job(reason="a disk is full: /data")}, "degraded", "a disk is full: /data"),
        ({"job": job(state="stuck", reason="its master has ended")}, "degraded", "its master has ended"),
        ({"job": job(state="waiting", reason="a backfill")}, "degraded", "the windows wait: a backfill"),
        ({"job": job(updated_ms=NOW - 20_000)}, "degraded", "said nothing for 20 s"),
        ({"job": job(updated_ms=NOW - 90_000)}, "unhealthy", "said nothing for 90 s"),
        ({"job": job(executors=0)}, "degraded", "0 of 1 Spark executors"),
        ({"job": job(lag=10_000)}, "degraded", "10,000 ratings behind"),
        ({"generator": generator(behind_s=12.0)}, "degraded", "behind by 12.0 s"),
        ({"generator": generator(updated_ms=NOW - 30_000)}, "degraded", "said nothing for 30 s"),
        ({"generator": generator(actors=[{"actor": 1, "alive": False}])}, "degraded", "actor 1 is down"),
        ({"surplus": {0: -1}, "disagreeing_since_ms": NOW - 11_000}, "unhealthy", "1 ratings that were sent"),
        ({"surplus": {0: 10}, "disagreeing_since_ms": NOW - 11_000}, "unhealthy", "10 records that no shard sent"),
        ({"surplus": {0: 10}, "disagreeing_since_ms": NOW - 1_000}, "healthy", None),
        ({"oracle": {}}, "degraded", "no oracle has reported"),
        ({"oracle": {"state": "failed", "reason": "no catalogue"}}, "degraded", "no catalogue"),
        (
            {"oracle": {"state": "running", "batch": 3, "updated_ms": NOW - 15_000}},
            "degraded",
            "the oracle has said nothing",
        ),
        ({"job": job(batch=300)}, "degraded", "the oracle is 295 micro-batches behind"),
        ({"scores": {}}, "healthy", None),
        (
            {"scores": {"state": "failed", "reason": "Kafka is away"}},
            "degraded",
            "the scoreboard failed: Kafka is away",
        ),
        ({"windows": Tally(9, 1, 0, 2, "window A holds 3")}, "unhealthy", "window A holds 3 (and 1 more)"),
        ({"generator": generator(state="stopped"), "job": job(state="stopped")}, "stopped", "have stopped"),
        (
            {"generator": {}, "job": job(state="stopped", updated_ms=NOW - 3_600_000)},
            "stopped",
            "Spark job has stopped",
        ),
        ({"generator": generator(state="starting"), "job": job(state="stopped")}, "starting", "not started again yet"),
        ({"generator": generator(state="stopped")}, "healthy", None),
    ],
)
def test_health_says_why(changes: dict[str, Any], status: str, reason: str | None) -> None:
    found = assess(evidence(**changes))
    assert found.status == status
    assert (reason is None and not found.reasons) or any(reason in r for r in found.reasons if reason)
    assert (found.stale_since_ms is not None) == ("said nothing" in str(changes and reason) and "job" in changes)


def test_a_job_that_has_stopped_while_the_generator_goes_on_is_said_and_its_windows_are_stale() -> None:
    store = MetricsStore((TUMBLING,))
    store.kafka_connected = True

    def at(second: int, generator_is: str, job_is: str, job_said_s: int | None = None) -> tuple[str, str, int | None]:
        now_ms = NOW + second * 1000
        store.progress("generator", generator(state=generator_is, updated_ms=now_ms), now_ms)
        said_ms = now_ms if job_said_s is None else NOW + job_said_s * 1000
        store.job(job(state=job_is, updated_ms=said_ms, partitions={}), now_ms)
        store.expected("oracle", {"state": "running", "batch": 3, "updated_ms": now_ms}, now_ms)
        found = store.health(now_ms)
        return found.status, "; ".join(found.reasons), found.stale_since_ms

    assert at(0, "running", "running")[0] == "healthy"
    for second in range(1, 12):
        assert at(second, "running", "stopped", 1) == ("healthy", "", None)
    alone = ("degraded", "the Spark job has stopped, and the generator goes on", NOW + 1_000)
    assert at(12, "running", "stopped", 1) == at(13, "paused", "stopped", 1) == alone
    assert (
        store.health(NOW + 60_000).reasons[0] == "the Spark job has stopped"
    )  # of the generator nothing is known then
    assert at(61, "running", "running") == ("healthy", "", None)
    # an end in order: the generator first, and it may take its time
    for second in range(62, 120):
        status, reasons, stale = at(
            second, "stopping" if second < 80 else "stopped", "running" if second < 90 else "stopped"
        )
        assert (status, stale) == ("healthy" if second < 90 else "stopped", None), reasons
    # the next start: the job comes up first, the generator sends then, and the job says so a moment later
    for second in range(1_000, 1_030):
        assert at(second, "starting", "stopped", 119)[::2] == ("starting", None)
    for second in range(1_030, 1_033):
        assert at(second, "running", "stopped", 119) == ("healthy", "", None)
    assert at(1_033, "running", "running") == ("healthy", "", None)
    # whoever begins to look does not wait
    begun = MetricsStore((TUMBLING,))
    begun.kafka_connected = True
    begun.job(job(state="stopped", updated_ms=NOW), NOW + 3_600_000)
    begun.progress("generator", generator(updated_ms=NOW + 3_580_000), NOW + 3_600_000)
    begun.progress("generator", generator(updated_ms=NOW + 3_600_000), NOW + 3_600_000)
    assert begun.health(NOW + 3_600_000).status == "degraded"


@pytest.mark.parametrize(("interval_ms", "unread_s", "status"), [
    (None, 14, "healthy"), (None, 16, "degraded"), (0, 16, "degraded"),
    (60_000, 60, "healthy"), (60_000, 120, "healthy"), (60_000, 136, "degraded"),
])  # fmt: skip
def test_what_came_since_a_micro_batch_is_unread_for_as_long_as_there_is_none(
    interval_ms: int | None, unread_s: int, status: str
) -> None:
    said = {} if interval_ms is None else {"trigger_interval_ms": interval_ms}
    found = assess(evidence(job=job(lag=unread_s * 100, **said)))
    assert found.status == status and ("ratings behind" in "".join(found.reasons)) == (status == "degraded")


def window(window_type: str, start_ms: int, length_ms: int, kind: str = "total", **fields: Any) -> dict[str, Any]:
    return {
        "window_start": iso_ms(start_ms),
        "window_end": iso_ms(start_ms + length_ms),
        "window_type": window_type,
        "count": 5,
        "avg_rating": 3.5,
        "kind": kind,
        "updated_ms": NOW,
        **fields,
    }


def filled() -> MetricsStore:
    store = MetricsStore((TUMBLING, SLIDING))
    base = NOW - NOW % 60_000
    for minute in range(3):
        store.window(window(TUMBLING, base + minute * 60_000, 60_000, count=minute + 1))
    for minute in range(-4, 3):
        store.window(window(SLIDING, base + minute * 60_000, 300_000, count=10 + minute))
    return store


def test_tumbling_and_sliding_never_overwrite_each_other() -> None:
    windows = filled().summary(NOW)["windows"]
    assert windows[TUMBLING]["count"] == 3
    # of the sliding windows around the newest rating, the one that ends first has the most data
    assert windows[SLIDING]["count"] == 8
    assert len(filled().history(TUMBLING)) == 3 and len(filled().history(SLIDING)) == 3


def test_however_many_windows_there_are_few_are_looked_at_for_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    store, base = MetricsStore((TUMBLING, SLIDING)), NOW - NOW % 60_000
    for minute in range(2_000):
        store.window(window(TUMBLING, base + minute * 60_000, 60_000))
        store.window(window(SLIDING, base + minute * 60_000, 300_000))
    looked: list[str] = []
    monkeypatch.setattr(store_module, "epoch_ms", lambda text: looked.append(text) or epoch_ms(text))  # type: ignore[func-returns-value]
    assert store.current(TUMBLING) == base + 1_999 * 60_000 and store.current(SLIDING) == base + 1_995 * 60_000
    assert len(looked) < 10


def test_the_current_window_is_found_in_any_order_of_records_with_gaps_and_without_those_taken_back() -> None:
    store, base = MetricsStore((TUMBLING, SLIDING)), NOW - NOW % 60_000
    for minute in (7, 2, 9, 3, 0, 8, 1):
        store.window(window(SLIDING, base + minute * 60_000, 300_000, count=minute))
    assert store.current(SLIDING) == base + 7 * 60_000
    store.no_window(f"{SLIDING}|{iso_ms(base + 7 * 60_000)}|total")
    assert store.current(SLIDING) == base + 8 * 60_000
    for minute in (8, 9, 9):
        store.no_window(f"{SLIDING}|{iso_ms(base + minute * 60_000)}|total")
    assert store.current(SLIDING) == base and [w["count"] for w in store.history(SLIDING)] == [0]
    store.window(window(SLIDING, base + 4 * 60_000, 300_000, count=4))
    assert store.current(SLIDING) == base
    store.window(window(SLIDING, base + 5 * 60_000, 300_000, count=5))
    assert [w["count"] for w in store.history(SLIDING)] == [0, 1]
    assert [w["count"] for w in store.history(SLIDING, base + 1, base + 60_001)] == [1]
    assert store.history(SLIDING, base + 120_000) == store.history(SLIDING, None, base) == []


def test_records_are_absolute_and_history_has_bounds() -> None:
    store = filled()
    base = NOW - NOW % 60_000
    for _ in range(3):
        store.window(window(TUMBLING, base, 60_000, count=77))
    assert [w["count"] for w in store.history(TUMBLING)] == [77, 2, 3]
    assert [w["count"] for w in store.history(TUMBLING, limit=1)] == [3]
    assert [w["count"] for w in store.history(TUMBLING, base + 60_000, base + 120_000)] == [2]


def test_a_window_is_final_when_the_watermark_has_passed_it() -> None:
    store = filled()
    base = NOW - NOW % 60_000
    store.job(job(watermark_ms=base + 60_000), NOW)
    assert [w["final"] for w in store.history(TUMBLING)] == [True, False, False]


def test_an_empty_store_says_no_data_yet() -> None:
    store = MetricsStore((TUMBLING, SLIDING))
    summary = store.summary(NOW)
    assert summary["status"] == "no data yet" and summary["windows"] == {TUMBLING: None, SLIDING: None}
    assert store.topn(TUMBLING) is None and store.history(TUMBLING) == [] and store.latency_ms(NOW) is None
    assert store.health(NOW).status == "unhealthy"  # no Kafka yet


def test_the_store_stays_bounded() -> None:
    store = MetricsStore((TUMBLING,))
    for minute in range(300):
        store.window(window(TUMBLING, minute * 60_000, 60_000, "topn", movies=[]))
    assert store.topn(TUMBLING, 0) is None
    assert store.topn(TUMBLING, 299 * 60_000) is not None


def shard_progress(next_index: int, rate: float = 100.0) -> dict[str, Any]:
    schedule = ShardSchedule(RatePlan([Epoch(NOW - 60_000, rate)]), 0.25, 0.5)
    return {
        "partition": 0,
        "next_index": next_index,
        "event_time_ms": int(schedule.due_ms(next_index - 1, 1)[0]),
        "epochs": [{"from_ms": NOW - 60_000, "rate": rate}],
        "committed_ms": NOW,
        "share": 0.25,
        "phase": 0.5,
    }


@example(410, 0, 1, 100.0)  # whose last rating falls on the very end of a millisecond
@given(st.integers(1, 1000), st.integers(0, 500), st.integers(-5, 5), st.sampled_from([0.3, 100.0, 50_000.0]))
def test_too_many_and_too_few_are_seen_while_ratings_flow(read: int, ahead: int, difference: int, rate: float) -> None:
    newest = shard_progress(read, rate)["event_time_ms"]
    found = surplus(shard_progress(read + ahead, rate), max(0, read + difference), newest)
    assert found is not None
    several_in_a_millisecond = rate > 4_000
    if several_in_a_millisecond:
        assert abs(found - (max(0, read + difference) - read)) <= rate / 4_000 + 1
    else:
        assert found == max(0, read + difference) - read


def test_a_job_ahead_of_the_progress_at_hand_is_not_judged() -> None:
    assert surplus(shard_progress(10), 11, int(shard_progress(11)["event_time_ms"])) is None


def test_a_scoreboard_that_failed_degrades_health_until_one_runs_again() -> None:
    store = MetricsStore((TUMBLING,))
    store.kafka_connected = True
    store.progress("generator", generator(), NOW)
    store.expected("oracle", {"state": "running", "batch": 5, "updated_ms": NOW}, NOW)
    store.job(job(), NOW)
    store.score("", {"records": 0, "rejected": {}, "state": "failed", "reason": "another catalogue", "updated_ms": NOW})
    found = store.health(NOW)
    assert found.status == "degraded"
    assert found.reasons == ("learners are not scored: the scoreboard failed: another catalogue",)
    store.score("", {"records": 0, "rejected": {}, "state": "running", "reason": "", "updated_ms": NOW})
    assert store.health(NOW).status == "healthy"


def test_a_lasting_difference_between_sent_and_read_turns_health_red() -> None:
    store = MetricsStore((TUMBLING,))
    store.kafka_connected = True
    newest = shard_progress(100)["event_time_ms"]

    def read(records: int) -> dict[str, Any]:
        return job(partitions={"0": {"records": records, "next_offset": records, "max_event_ms": newest}})

    store.progress("generator", generator(), NOW)
    store.progress("shard/0", shard_progress(120), NOW)
    store.expected("oracle", {"state": "running", "batch": 3, "updated_ms": NOW}, NOW)
    store.job(read(100), NOW)
    assert store.health(NOW + 9_000).status == "healthy"
    store.job(read(107), NOW)
    found = store.health(NOW + 10_001)
    assert found.status == "unhealthy" and found.reasons[0] == "partition 0 holds 7 records that no shard sent"
    store.job(read(98), NOW)
    assert "2 ratings that were sent have not been read" in store.health(NOW + 10_001).reasons[0]
    store.job(read(100), NOW)
    assert store.health(NOW + 9_000).reasons == ()


def test_another_stream_in_the_same_topics_has_nothing_of_the_one_before() -> None:
    store = MetricsStore((TUMBLING,))
    store.kafka_connected = True

    def stream(name: str, read: int, posted: int, batch: int) -> bool:
        """Whether another one began."""
        another = store.progress("run", {"run": name, "settings": {}}, NOW)
        store.progress("generator", generator(run=name), NOW)
        store.progress("shard/0", shard_progress(read), NOW)
        for offset in range(200, 200 + posted):
            said = {"userId": 1, "movieId": 1, "rating": 3.0, "timestamp": NOW - 50_000}
            store.posted({"partition": 0, "offset": offset, **said}, NOW)
        newest_ms = shard_progress(read)["event_time_ms"]
        partitions = {"0": {"records": read + posted, "next_offset": 300, "max_event_ms": newest_ms}}
        store.job(job(batch=batch, partitions=partitions), NOW)
        store.expected("oracle", {"state": "running", "batch": batch, "updated_ms": NOW}, NOW)
        store.reject({"partition": 0, "offset": 7, "reason": name})
        return another

    assert not stream("a", 1_000, 40, 50)
    store.window(window(TUMBLING, NOW, 60_000, batch=40))  # wrong: no rating belongs to it
    store.score("mine", {"model": "mine"})
    assert not stream("a", 1_010, 40, 51)  # a start that goes on with it
    assert len(store.history(TUMBLING)) == 1 and store.generator(NOW)["delivered_total"] == 1_010
    assert stream("b", 100, 0, 2)
    found = store.health(NOW + 9_000)
    assert found.reasons == () and store.outside() == {} and store.history(TUMBLING) == []
    assert store.windows(NOW)["wrong"] == store.windows(NOW)["pending"] == 0 and store.scores()["models"] == []
    assert store.generator(NOW)["delivered_total"] == 100 and [r["reason"] for r in store.rejects()] == ["b"]
    assert store.run()["run"] == "b" and store.kafka_connected


def test_what_was_there_before_is_no_rate() -> None:
    store = MetricsStore((TUMBLING,))
    store.progress("shard/0", shard_progress(1_000_000), NOW)
    store.progress("shard/0", {**shard_progress(1_000_010), "committed_ms": NOW + 1_000}, NOW + 1_000)
    found = store.generator(NOW + 1_000)
    assert found["delivered_rate"] < 20 and found["delivered_total"] == 1_000_010


def test_what_was_rejected_is_listed_once_however_often_a_micro_batch_runs() -> None:
    store = MetricsStore((TUMBLING, SLIDING))
    batch = [{"partition": p, "offset": 7 + n, "reason": "why"} for n in range(3) for p in (0, 1)]
    for record in (*batch, *batch):
        store.reject(record)
    assert store.rejects() == batch[::-1]
    many = [{"partition": 2, "offset": n, "reason": "why"} for n in range(10_000)]
    for record in many:
        store.reject(record)
    kept = store.rejects()
    assert 0 < len(kept) < 1000 and kept == many[-len(kept) :][::-1]
