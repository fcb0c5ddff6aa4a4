"""The storm's pure parts: plan, recovery, whose process is whose, report; and the watchdog that one of its faults is for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.chaos.inject import phase_of
from ray_pipeline.chaos.plan import KINDS, Fault, Kind, parse_kinds, plan
from ray_pipeline.chaos.recovery import Recovery, Sample, ShardSeen, at_rate, fresh
from ray_pipeline.chaos.report import MemorySeries, Outcome, StormReport, as_table, slope_mib_per_min
from ray_pipeline.chaos.storm import together
from ray_pipeline.chaos.victims import ProcessRow, Role, roles
from ray_pipeline.clock import FakeClock
from ray_pipeline.windows.watchdog import ExecutorWatchdog

NOW_MS = 1_700_000_000_000
seeds = st.integers(0, 2**32)
some_kinds = st.sets(st.sampled_from(KINDS), min_size=1)

# -- plan


@settings(deadline=None)
@given(seeds, some_kinds, st.integers(0, 150), st.integers(0, 150))
def test_a_plan_is_a_function_of_its_seed_and_a_longer_one_begins_with_a_shorter(
    seed: int, kinds: set[Kind], count: int, more: int
) -> None:
    short = plan(seed, count, kinds)
    assert short == plan(seed, count, sorted(kinds, reverse=True))
    assert plan(seed, count + more, kinds)[:count] == short
    assert [fault.number for fault in short] == list(range(count))


@settings(deadline=None)
@given(seeds, some_kinds)
def test_every_kind_comes_in_every_round_and_nothing_else(seed: int, kinds: set[Kind]) -> None:
    assert {fault.kind for fault in plan(seed, 80, kinds)} == kinds


@settings(deadline=None)
@given(seeds, some_kinds)
def test_evenly_means_each_kind_once_a_round(seed: int, kinds: set[Kind]) -> None:
    assert sorted(fault.kind for fault in plan(seed, len(kinds), kinds, evenly=True)) == sorted(kinds)


@settings(deadline=None)
@given(seeds)
def test_what_a_fault_is_told_is_bounded(seed: int) -> None:
    for fault in plan(seed, 160):
        told: dict[str, Any] = dict(fault.parameters)
        assert 0 <= fault.after_s <= 1.5
        assert 0 <= told.get("pick", 0) <= 1 and 0 < told.get("seconds", 1) <= 20
        assert 0.5 <= told.get("factor", 1) <= 2 and 1 <= told.get("actors", 1) <= 3
        assert -0.6 <= told.get("offset", 0) <= 0.6
        assert not (fault.number == 0 and fault.overlapping)


def test_seeds_differ() -> None:
    assert len({tuple((f.kind, f.after_s) for f in plan(seed, 12)) for seed in range(20)}) == 20


def test_kinds_are_named_or_refused() -> None:
    assert parse_kinds(None) == KINDS
    assert parse_kinds("rate, kill-broker") == (Kind.KILL_BROKER, Kind.RATE)
    for wrong in ("rate,kill-nobody", " , "):
        with pytest.raises(ValueError):
            parse_kinds(wrong)


def test_faults_come_alone_or_in_pairs_that_do_not_undo_each_other() -> None:
    def fault(number: int, kind: Kind, overlapping: bool) -> Fault:
        return Fault(number, kind, 0.0, overlapping)

    faults = [
        fault(0, Kind.RATE, False),
        fault(1, Kind.KILL_BROKER, True),
        fault(2, Kind.KILL_SERVING, True),
        fault(3, Kind.PAUSE, False),
        fault(4, Kind.RATE, True),
    ]
    assert [[f.number for f in group] for group in together(faults)] == [[0, 1], [2], [3], [4]]


@settings(deadline=None)
@given(seeds)
def test_pairing_loses_no_fault(seed: int) -> None:
    faults = plan(seed, 100)
    groups = list(together(faults))
    assert [f for group in groups for f in group] == faults
    assert all(1 <= len(group) <= 2 and not any(f.number == 0 for f in group[1:]) for group in groups)


# -- recovery


def sample(at_ms: int, event_ms: int, **changes: Any) -> Sample:
    whole = Sample(
        at_ms=at_ms,
        shards={0: ShardSeen(event_ms, 200.0, 0.5), 1: ShardSeen(event_ms, 200.0, 0.5)},
        actors_down=0,
        job_state="running",
        executors_missing=0,
        windowed_ms={0: event_ms, 1: event_ms},
        api_answers=True,
    )
    return dataclasses.replace(whole, **changes)


def test_at_the_rate_means_every_shard_on_time_with_ratings_due_after_the_fault() -> None:
    assert at_rate(sample(NOW_MS + 3_000, NOW_MS + 2_500), NOW_MS, 200.0)
    assert not at_rate(sample(NOW_MS + 500, NOW_MS - 10), NOW_MS, 200.0), "sent before the fault"
    assert not at_rate(sample(NOW_MS + 3_000, NOW_MS + 1_500), NOW_MS, 200.0), "late"
    assert not at_rate(sample(NOW_MS + 3_000, NOW_MS + 2_500), NOW_MS, 400.0), "another rate"
    assert not at_rate(sample(NOW_MS + 3_000, NOW_MS + 2_500, actors_down=1), NOW_MS, 200.0)
    one_behind = {0: ShardSeen(NOW_MS + 2_500, 200.0, 0.5), 1: ShardSeen(NOW_MS - 1, 200.0, 0.5)}
    assert not at_rate(sample(NOW_MS + 3_000, 0, shards=one_behind), NOW_MS, 200.0)
    slow = {0: ShardSeen(NOW_MS + 1, 0.5, 1.0)}  # one rating every two seconds
    assert at_rate(sample(NOW_MS + 4_000, 0, shards=slow), NOW_MS, 0.5)
    assert not at_rate(sample(NOW_MS, 0, shards={}), NOW_MS, 200.0), "nothing is known yet"


def test_fresh_means_windows_of_every_partition_hold_ratings_of_now() -> None:
    now = NOW_MS + 10_000
    assert fresh(sample(now, now - 1_000), NOW_MS)
    assert not fresh(sample(now, now - 5_500), NOW_MS)
    assert not fresh(sample(NOW_MS + 1_000, NOW_MS - 1), NOW_MS)
    assert not fresh(sample(now, now - 1_000, executors_missing=1), NOW_MS)
    assert not fresh(sample(now, now - 1_000, job_state="stuck"), NOW_MS)
    assert not fresh(sample(now, now - 1_000, windowed_ms={0: now}), NOW_MS)


def test_the_time_is_that_from_which_on_it_held_for_a_moment() -> None:
    recovery = Recovery(NOW_MS, 200.0)
    assert not recovery.observe(sample(NOW_MS + 300, NOW_MS + 100))
    assert not recovery.observe(sample(NOW_MS + 1_700, NOW_MS + 100)), "it fell behind again"
    assert recovery.seconds(recovery.at_rate) is None and "set rate" in recovery.wanting()
    assert not recovery.observe(sample(NOW_MS + 4_000, NOW_MS + 3_900))
    assert recovery.observe(sample(NOW_MS + 5_500, NOW_MS + 5_400))
    assert recovery.seconds(recovery.at_rate) == 4.0
    assert recovery.seconds(recovery.fresh) == 0.3 == recovery.seconds(recovery.api)


def test_a_hiccup_later_does_not_move_the_time_but_all_must_be_well_at_once() -> None:
    recovery = Recovery(NOW_MS, 200.0)
    for at_s in (1, 3):
        recovery.observe(sample(NOW_MS + at_s * 1_000, NOW_MS + at_s * 1_000, job_state="stuck"))
    assert not recovery.observe(sample(NOW_MS + 6_000, NOW_MS + 4_000))
    assert recovery.seconds(recovery.at_rate) == 1.0
    assert not recovery.observe(sample(NOW_MS + 8_000, NOW_MS + 8_000))
    assert recovery.observe(sample(NOW_MS + 9_500, NOW_MS + 9_500))
    assert recovery.seconds(recovery.fresh) == 6.0 and recovery.seconds(recovery.at_rate) == 1.0


def test_nothing_is_well_without_the_api() -> None:
    recovery = Recovery(NOW_MS, 200.0)
    for second in range(1, 10):
        assert not recovery.observe(sample(NOW_MS + second * 1000, NOW_MS + second * 1000, api_answers=False))
    assert "API" in recovery.wanting()


# -- victims


def java(pid: int, parent: int, *command: str) -> ProcessRow:
    return ProcessRow(pid, parent, float(pid), "java", ("java", *command))


def test_processes_are_told_apart_by_what_the_run_published_and_by_their_command() -> None:
    worker = "io.ray.runtime.runner.worker.DefaultWorker"
    rows = [
        ProcessRow(1, 0, 1.0, "ray-pipeline", ("ray-pipeline", "run")),
        ProcessRow(2, 1, 2.0, "raylet", ("raylet",)),
        ProcessRow(3, 2, 3.0, "ray::_WorkerActor", ("ray::_WorkerActor",)),
        ProcessRow(4, 2, 4.0, "ray::_ProcessingActor", ("ray::_ProcessingActor",)),
        ProcessRow(5, 2, 5.0, "ray::_ServingActor.status", ("ray::_ServingActor.status",)),
        java(6, 4, "pyspark-shell"),
        java(7, 1, "-cp", "x", "kafka.Kafka", "server.properties"),
        java(8, 2, "-Dspark.driver.port=4", worker),
        java(9, 2, "-Dspark.executor.instances=1", worker),
        java(10, 2, "AppMasterEntryPoint"),
        ProcessRow(11, 2, 11.0, "ray::_VerificationActor", ("ray::_VerificationActor",)),
    ]
    found = roles(reversed(rows), 1, {"actors": [{"pid": 3}, {"pid": None}]}, {"pid": 4})
    assert {role: [row.pid for row in of] for role, of in found.items()} == {
        Role.RUN: [1],
        Role.RAY: [2],
        Role.GENERATOR: [3],
        Role.DRIVER: [4],
        Role.SERVING: [5],
        Role.DRIVER_JVM: [6],
        Role.BROKER: [7],
        Role.EXECUTOR: [8],
        Role.MASTER: [9, 10],
        Role.VERIFYING: [11],
    }


@pytest.mark.parametrize(
    ("age_ms", "phase"),
    [(0, "inside, done"), (40, "after"), (80, "before"), (100, "inside, undone"), (400, "inside, undone")],
)
def test_where_in_a_commit_a_kill_fell(age_ms: int, phase: str) -> None:
    assert phase_of(age_ms, 100) == phase


# -- report


def outcome(number: int, kind: str = "rate", **changes: Any) -> Outcome:
    return dataclasses.replace(Outcome(number, kind, False, number * 10.0, "x", "", 1.0 + number, 2.0, 0.1), **changes)


def storm_report(audit: dict[str, Any] | None, *outcomes: Outcome, aborted: str = "") -> StormReport:
    return StormReport(
        1, 600.0, 200.0, outcomes, {"broker": {"mib": 400.0, "mib_per_min": 0.5}}, {"the broker": 3}, audit, aborted
    )


AGREED = {
    "verdict": "agreed",
    "records": {"expected": 5, "found": 5, "missing": 0, "repeated": 0},
    "windows": {"checked": 2, "wrong": 0, "late_dropped": 0},
    "findings": [],
}


def test_a_storm_is_survived_only_when_all_recovered_and_all_was_checked() -> None:
    good = outcome(0)
    assert storm_report(AGREED, good).verdict == "survived"
    assert storm_report(None, good).verdict == "unchecked"
    assert storm_report({**AGREED, "verdict": "unchecked"}, good).verdict == "unchecked"
    assert storm_report({**AGREED, "verdict": "disagreed"}, good).verdict == "failed"
    assert storm_report(AGREED, outcome(0, failed="slow")).verdict == "failed"
    assert storm_report(AGREED, good, aborted="the run has ended").verdict == "failed"


def test_times_are_told_by_kind_and_what_was_skipped_does_not_count() -> None:
    rows = [outcome(n) for n in range(20)]
    kills = [
        outcome(20, "kill-in-commit", phase="inside, done"),
        outcome(21, "rescale", skipped="unknown control command refused"),
        outcome(22, "kill-broker", at_rate_s=None, failed="the generator is not at the set rate"),
    ]
    found = storm_report(AGREED, *rows, *kills).as_dict()
    assert found["faults"] == {"injected": 22, "overlapping": 0, "skipped": 1, "not_recovered": 1}
    assert found["by_kind"]["rate"]["time_to_rate_s"] == {"p50": 10.0, "p95": 19.0, "max": 20.0}
    assert found["by_kind"]["kill-broker"]["time_to_rate_s"] == {"p50": None, "p95": None, "max": None}
    assert "rescale" not in found["by_kind"]
    assert found["commit_phases_hit"] == {"inside, done": 1}
    text = as_table(found)
    assert "**failed**: 22 faults in 10 min" in text and "| gaps | 0 |" in text and "| broker | 400 | +0.50 |" in text
    assert "| the broker | 3 |" in text


@settings(deadline=None)
@given(st.floats(-50, 50), st.integers(10, 200))
def test_the_slope_of_memory_is_found_through_restarts(slope: float, points: int) -> None:
    at_s = [5.0 * n for n in range(points)]
    memory = [(1000.0 + slope * at / 60.0) * 2**20 for at in at_s]
    memory[points // 2] = 10.0 * 2**20  # a process that has just been started again
    memory[points // 3] = math.nan
    assert slope_mib_per_min(at_s, memory) == pytest.approx(slope, abs=1e-3 + abs(slope) * 0.01)


def test_memory_of_roles_that_come_and_go() -> None:
    series = MemorySeries()
    series.add(0.0, {"broker": 2**20})
    series.add(5.0, {"broker": 2**20, "Spark executor": 2**21})
    assert series.slopes()["broker"] == {"mib": 1.0, "mib_per_min": 0.0}
    assert series.slopes()["Spark executor"]["mib"] == 2.0
    series.add(10.0, {"broker": 2**20})
    assert "Spark executor" not in series.slopes(), "it does not run at the end"


# -- the watchdog over Spark's executors


def test_executors_may_be_away_for_half_a_minute() -> None:
    clock, watchdog = FakeClock(), ExecutorWatchdog(2)
    assert not watchdog.observe(clock.now_ms(), 2)
    assert not watchdog.observe(clock.now_ms(), 1)
    clock.advance(29.9)
    assert not watchdog.observe(clock.now_ms(), 0)
    clock.advance(0.1)
    assert watchdog.observe(clock.now_ms(), 1)


def test_an_executor_that_comes_back_starts_the_wait_anew() -> None:
    clock, watchdog = FakeClock(), ExecutorWatchdog(1)
    for _ in range(5):
        assert not watchdog.observe(clock.now_ms(), 0)
        clock.advance(20)
        assert not watchdog.observe(clock.now_ms(), 1)
        clock.advance(20)


def test_without_executors_of_its_own_nothing_is_watched() -> None:
    clock, watchdog = FakeClock(), ExecutorWatchdog(0)
    watchdog.observe(clock.now_ms(), 0)
    clock.advance(1000)
    assert not watchdog.observe(clock.now_ms(), 0)


def test_without_a_master_nobody_waits_for_executors_to_come_back() -> None:
    clock, watchdog = FakeClock(), ExecutorWatchdog(2)
    assert not watchdog.observe(clock.now_ms(), 2, master_is_gone=True)
    assert watchdog.observe(clock.now_ms(), 0, master_is_gone=True)
