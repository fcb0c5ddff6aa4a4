"""The storm's pure parts: plan, recovery, whose process is whose, report; and the watchdog that one of its faults is for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ray_pipeline.__main__ import app
from ray_pipeline.chaos import inject, observer
from ray_pipeline.chaos.child import ChildRun
from ray_pipeline.chaos.inject import Injected, Injector, phase_of
from ray_pipeline.chaos.observer import Observer
from ray_pipeline.chaos.plan import KINDS, Fault, Kind, parse_kinds, plan
from ray_pipeline.chaos.recovery import Recovery, Sample, ShardSeen, at_rate, fresh
from ray_pipeline.chaos.report import Audited, MemorySeries, Outcome, StormReport, as_table, slope_mib_per_min
from ray_pipeline.chaos.storm import Storm, together
from ray_pipeline.chaos.victims import ProcessRow, Role, roles
from ray_pipeline.clock import FakeClock, SystemClock
from ray_pipeline.command import storming
from ray_pipeline.config import Settings, load_settings, settings_of
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.errors import StageFailedError
from ray_pipeline.fitted import write_fitted
from ray_pipeline.generator.plan import RatePlan, ShardSchedule
from ray_pipeline.kafka.read import Record
from ray_pipeline.metrics.verdicts import Tally
from ray_pipeline.state import RunInfo
from ray_pipeline.truth.audit import Finding
from ray_pipeline.verification.audit import AuditReport
from ray_pipeline.windows.watchdog import ExecutorWatchdog
from tests.unit.test_conformance import small_model

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
    assert {fault.kind for fault in plan(seed, 84, kinds)} == kinds


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
        fault(5, Kind.KILL_RUN, True),
        fault(6, Kind.KILL_BROKER, True),
    ]
    assert [[f.number for f in group] for group in together(faults)] == [[0, 1], [2], [3], [4], [5], [6]]


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


def test_nothing_is_well_until_the_oracle_has_compared_what_the_job_had_read() -> None:
    recovery = Recovery(NOW_MS, 200.0)
    for second in range(1, 5):
        now = NOW_MS + second * 1000
        assert not recovery.observe(sample(now, now, job_batch=70 + second, oracle_batch=60, oracle_ms=now))
    assert "oracle" in recovery.wanting()
    before = NOW_MS - 1  # the last word of one that was killed
    assert not recovery.observe(sample(NOW_MS + 5_000, NOW_MS + 5_000, oracle_batch=71, oracle_ms=before))
    for at_ms in (6_000, 8_000):
        now = NOW_MS + at_ms
        well = recovery.observe(sample(now, now, job_batch=90, oracle_batch=71, oracle_ms=now))
    assert well and recovery.seconds(recovery.oracle) == 6.0


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


@pytest.mark.parametrize(
    ("windows", "reason"),
    [
        ({"checked": 0, "wrong": 0, "reason": ""}, "no window to check"),
        ({"checked": 2, "wrong": 0, "reason": "no job has read anything yet"}, "no job has read anything yet"),
    ],
)
def test_a_storm_whose_windows_were_not_checked_is_not_survived(windows: dict[str, Any], reason: str) -> None:
    made = storm_report({**AGREED, "windows": windows}, outcome(0))
    assert made.verdict == "unchecked" and reason in made.reason


def test_a_report_says_what_the_storm_made_of_a_pipeline_of_its_own(tmp_path: Path) -> None:
    child = ChildRun(settings_of({"partitions": 8, "fast": True}), tmp_path, 200.0, 1)
    report = dataclasses.replace(storm_report(AGREED, outcome(0)), conditions=child.conditions).as_dict()
    preamble, _, _ = as_table(report).partition("|")
    assert "8 partitions, `--fast` delivery, windows of 10 s and 30 s" in preamble
    assert "watermark of 300 s (60 s by default)" in preamble
    assert "watermark" not in as_table(storm_report(AGREED, outcome(0)).as_dict())


def test_a_storm_that_did_nothing_proves_nothing() -> None:
    skipped = outcome(0, skipped="there is no process for it")
    for nothing in (storm_report(AGREED), storm_report(AGREED, skipped, skipped)):
        assert nothing.verdict == "unchecked" and "nothing was done" in nothing.reason
        assert "Because: nothing was done" in as_table(nothing.as_dict())


def test_goals_are_judged_and_a_missed_one_is_shown() -> None:
    rows = [outcome(n, "kill-generator", at_rate_s=4.0 + (n == 7)) for n in range(20)]
    spark = [outcome(20, "kill-driver", fresh_s=51.0), outcome(21, "kill-executor", fresh_s=20.0)]
    rate, fresh_again = storm_report(AGREED, *rows, *spark).as_dict()["goals"]
    assert (rate["limit_s"], rate["found_s"], rate["met"]) == (10.0, 21.0, False), "kill-driver's takes 21 s here"
    assert (fresh_again["limit_s"], fresh_again["found_s"], fresh_again["met"]) == (60.0, 51.0, True)
    found = storm_report(AGREED, *rows).as_dict()
    assert [goal["met"] for goal in found["goals"]] == [True, None] and found["goals"][0]["found_s"] == 4.0
    never = storm_report(AGREED, outcome(0, "kill-master", fresh_s=None, failed="the windows are not fresh"))
    assert never.as_dict()["goals"][1] == {**fresh_again, "found_s": None, "met": False}
    text = as_table(found)
    assert "p95 | 10 | 4.0 | met |" in text and "max | 60 | – | not tried |" in text
    start = outcome(0, "kill-run", at_rate_s=40.0)  # a whole start is no recovery of the generator
    assert storm_report(AGREED, start).as_dict()["goals"][0]["met"] is None


def test_times_are_told_by_kind_and_what_was_skipped_does_not_count() -> None:
    rows = [outcome(n) for n in range(20)]
    kills = [
        outcome(20, "kill-in-commit", phase="inside, done"),
        outcome(21, "rescale", skipped="unknown control command refused"),
        outcome(22, "kill-broker", at_rate_s=None, failed="the generator is not at the set rate"),
    ]
    found = storm_report(AGREED, *rows, *kills).as_dict()
    assert found["faults"] == {"injected": 22, "overlapping": 0, "skipped": 1, "not_recovered": 1, "untold": 0}
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


# -- the loop

OPEN = Tally(verified=3, pending=5, late=0, wrong=0, first_wrong="")
SO_FAR = AuditReport("agreed", records={"found": 500}, windows={"checked": 8, "reason": ""}, duration_s=2.5)


class Watching:
    """Observer, injector and audit of a pipeline that is well, but while it is audited; a test says what else they see."""

    def __init__(self, clock: FakeClock, surpluses: dict[int, int | None], windows: Tally = OPEN) -> None:
        self.base_rate = self.rate = 200.0
        self.clock, self.read, self.windows = clock, surpluses, windows
        self.done = Injected(0, 0, "x")
        self.left = ""
        self.report = SO_FAR
        self.behind_until_ms = 0
        self.hit_ms: list[int] = []

    def sample(self) -> Sample:
        now_ms = self.clock.now_ms()
        return sample(now_ms, now_ms if now_ms >= self.behind_until_ms else now_ms - 9_000)

    def audit(self) -> AuditReport:
        self.clock.advance(30)
        self.behind_until_ms = self.clock.now_ms() + 20_000
        return self.report

    def surpluses(self) -> dict[int, int | None]:
        return self.read

    def verified(self) -> Tally:
        return self.windows

    def restarts(self) -> dict[str, int]:
        return {}

    def inject(self, fault: Fault) -> Injected:
        self.hit_ms.append(self.clock.now_ms())
        return dataclasses.replace(self.done, begun_ms=self.clock.now_ms(), over_ms=self.clock.now_ms())

    def restore(self) -> None:
        pass

    def outlived(self) -> str:
        return ""

    def wait_until_gone(self) -> str:
        return self.left

    def roles(self) -> dict[Role, list[ProcessRow]]:
        return {}

    def phase(self, fault: Fault, done: Injected) -> str:
        return ""


def stormed(
    surpluses: dict[int, int | None],
    windows: Tally = OPEN,
    done: Injected | None = None,
    left: str = "",
    found: AuditReport = SO_FAR,
    faults: list[Fault] | None = None,
) -> tuple[StormReport, list[str]]:
    clock, said = FakeClock(NOW_MS), list[str]()
    watching: Any = Watching(clock, surpluses, windows)
    watching.done, watching.left, watching.report = done or watching.done, left, found
    storm = Storm(watching, watching, watching.audit, clock, said.append, threading.Event())
    storm.run(faults or plan(1, 2, (Kind.KILL_BROKER,)), 600.0)
    report = storm_report(AGREED, *storm.outcomes, aborted=storm.aborted)
    return dataclasses.replace(report, windows=storm.windows, audits=tuple(storm.audits)), said


def test_after_each_fault_what_was_read_and_all_windows_are_compared() -> None:
    report, _ = stormed({0: 0, 1: 0})
    assert (report.verdict, len(report.outcomes), report.windows) == ("survived", 2, OPEN)
    assert "| windows verified | 3 |" in as_table(report.as_dict())
    report, _ = stormed({0: 0, 1: -2})
    assert report.verdict == "failed" and "-2 of partition 1" in report.reason
    report, _ = stormed({0: 0, 1: 0}, dataclasses.replace(OPEN, wrong=1, first_wrong="window tumbling_10s holds 3"))
    assert report.verdict == "failed" and "window tumbling_10s holds 3" in report.reason


def test_what_cannot_be_told_is_no_agreement_but_counted_and_shown() -> None:
    report, said = stormed({0: 0, 1: None})
    assert report.verdict == "survived" and report.as_dict()["faults"]["untold"] == 2
    assert all("could not be told: partition 1" in line for line in said)
    assert "| faults after which not all could be compared | 2 |" in as_table(report.as_dict())


def test_after_each_fault_all_records_and_windows_so_far_are_audited() -> None:
    report, _ = stormed({0: 0})
    found = report.as_dict()
    assert (report.verdict, found["faults"]["untold"]) == ("survived", 0)
    times = {"p50": 2.5, "p95": 2.5, "max": 2.5}
    assert found["audits"] == {
        "made": 2,
        "agreed": 2,
        "records_checked": 1_000,
        "windows_checked": 16,
        "duration_s": times,
    }
    assert [o["audit"] for o in json.loads(json.dumps(found))["outcomes"]] == [
        {"verdict": "agreed", "records": 500, "windows": 8, "duration_s": 2.5}
    ] * 2
    table = as_table(found)
    assert "| audits of all records and windows so far | 2 |" in table
    assert "| records that they compared, over all | 1,000 |" in table


def test_faults_that_overlap_share_an_audit() -> None:
    report, _ = stormed({0: 0}, faults=[Fault(0, Kind.KILL_BROKER, 0.0), Fault(1, Kind.RATE, 0.0, True)])
    assert [outcome.audit for outcome in report.outcomes] == [Audited("agreed", 500, 8, 2.5)] * 2
    assert report.as_dict()["audits"]["made"] == 1


def test_an_audit_that_disagrees_fails_the_fault_and_names_what_it_found_first() -> None:
    findings = [Finding("missing", 1, 77, None, "rating 77 is missing"), Finding("window", None, None, None, "x")]
    found = dataclasses.replace(SO_FAR, verdict="disagreed", findings=findings)
    report, said = stormed({0: 0}, found=found)
    assert report.verdict == "failed"
    assert "the audit found missing: partition 1, index 77: rating 77 is missing" in report.reason
    assert all(outcome.failed for outcome in report.outcomes) and all("FAILED: the audit" in line for line in said)
    assert report.as_dict()["audits"]["agreed"] == 0


@pytest.mark.parametrize(
    "found",
    [
        AuditReport(reason="a transaction is open"),
        dataclasses.replace(SO_FAR, windows={"checked": 0, "reason": "a transaction is open"}),
    ],
)
def test_what_an_audit_could_not_check_is_counted_as_untold(found: AuditReport) -> None:
    report, said = stormed({0: 0}, found=found)
    assert report.verdict == "survived" and report.as_dict()["faults"]["untold"] == 2
    assert all("could not be told: a transaction is open" in line for line in said)


def test_the_time_of_an_audit_is_no_part_of_a_recovery_and_what_it_disturbs_is_over_before_the_next_fault() -> None:
    clock = FakeClock(NOW_MS)
    watching: Any = Watching(clock, {0: 0})
    storm = Storm(watching, watching, watching.audit, clock, lambda _: None, threading.Event())
    storm.run(plan(1, 3, (Kind.KILL_BROKER,)), 600.0)
    assert [outcome.at_rate_s for outcome in storm.outcomes] == pytest.approx([0.2] * 3, abs=0.01)
    first, second, third = watching.hit_ms
    assert min(second - first, third - second) > 50_000, "30 s of audit, 20 s until all was well"


def test_what_outlives_a_run_that_the_last_fault_killed_fails_the_storm() -> None:
    report, _ = stormed({0: 0}, left="raylet 7 outlived the run by 120 s")
    assert report.verdict == "failed" and "raylet 7 outlived" in report.reason
    assert not any(outcome.failed for outcome in report.outcomes), "it was not to be gone by then"


class Ending:
    """The processes of a run that was killed: each ends so many seconds after it."""

    def __init__(self, clock: FakeClock, ends_s: dict[int, float]) -> None:
        self._clock, self._ends_s, self.pid = clock, ends_s, 1

    def rows(self) -> list[ProcessRow]:
        return [ProcessRow(pid, 1, 1.0, "raylet", ("raylet",)) for pid in self._ends_s]

    def still_there(self, rows: list[ProcessRow]) -> list[ProcessRow]:
        return [row for row in rows if self._clock.now_ms() < NOW_MS + self._ends_s[row.pid] * 1000]

    def move_to(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("ends_s", "most_s", "left"),
    [
        ({7: 0.0, 8: 61.0}, 61.1, ""),
        ({7: 0.0, 8: 999.0}, 120.1, "raylet 8 outlived the run by 120 s"),
    ],
)
def test_at_the_end_those_of_a_killed_run_are_waited_for_as_long_as_they_may_take(
    ends_s: dict[int, float], most_s: float, left: str
) -> None:
    clock, end = FakeClock(NOW_MS), threading.Event()
    tree: Any = Ending(clock, ends_s)
    seen: Any = Observer(load_settings(), "", clock)

    class Child:
        def kill(self) -> None:
            pass

        def start_again(self) -> tuple[int, float]:
            return 2, 2.0

    child: Any = Child()
    injector = Injector(load_settings(), "", tree, seen, clock, 200.0, end, child)
    assert injector.wait_until_gone() == "" and clock.now_ms() == NOW_MS, "no run was killed"
    assert not injector.inject(Fault(0, Kind.KILL_RUN, 0.0, False)).skipped
    assert injector.outlived() == "", "they may take their time"
    assert injector.wait_until_gone() == left
    assert clock.now_ms() - NOW_MS <= most_s * 1000
    end.set()
    assert injector.wait_until_gone() == left, "it is told at once when nobody waits"


def test_a_command_that_was_refused_fails_the_storm() -> None:
    report, said = stormed({0: 0}, done=Injected(0, 0, "", failed="there is no room for 3 actors"))
    assert report.verdict == "failed" and "no room for 3 actors" in report.reason
    faults = report.as_dict()["faults"]
    assert (faults["injected"], faults["skipped"], faults["not_recovered"]) == (2, 0, 2)
    assert all("FAILED: there is no room for 3 actors" in line for line in said)


class Answers(dict[str, str]):
    """The same answer to every command, or none."""

    def get(self, key: str, default: Any = None) -> Any:
        return self["all"] if self else default


class Deaf:
    """A producer whose records arrive."""

    def produce(self, *_: object, **__: object) -> None:
        pass

    def flush(self, timeout_s: float) -> int:
        return 0


@pytest.mark.parametrize(("answers", "failed"), [({"all": "no room"}, "no room"), ({}, "did not answer to scale")])
def test_a_command_that_is_refused_or_never_answered_is_no_skipped_fault(
    answers: dict[str, str], failed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inject, "make_producer", lambda *_, **__: Deaf())
    clock = FakeClock(NOW_MS)
    seen: Any = Observer(load_settings(), "", clock)
    seen.record = lambda _key: {"answers": Answers(answers), "target_rate": 200.0, "actors": [{}, {}]}
    tree: Any = None
    injector = Injector(load_settings(), "", tree, seen, clock, 200.0, threading.Event())
    done = injector.inject(Fault(0, Kind.RESCALE, 0.0, False, {"actors": 3}))
    assert failed in done.failed and not done.skipped


@pytest.mark.parametrize(
    ("partitions", "now", "drawn", "told"),
    [
        (1, 1, 1, None),
        (1, 1, 3, None),
        (2, 1, 3, 2),
        (2, 2, 3, 1),
        (2, 1, 1, 2),
        (4, 3, 3, 2),
        (4, 2, 3, 3),
        (8, 8, 3, 3),
    ],
)
def test_actors_are_asked_for_as_the_partitions_of_the_run_allow_whatever_the_storm_was_told(
    partitions: int, now: int, drawn: int, told: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = {"run": {"settings": {"partitions": partitions}}, "generator": {"actors": [{}] * now}}
    seen, tree, asked = Observer(load_settings(), "", FakeClock(NOW_MS)), None, list[Any]()
    monkeypatch.setattr(seen, "record", lambda key: published.get(key, {}))
    injector = Injector(load_settings(), "", tree, seen, FakeClock(NOW_MS), 200.0, threading.Event())  # type: ignore[arg-type]
    monkeypatch.setattr(injector, "_tell", lambda command, **fields: asked.append((command, fields["actors"])))
    done = injector.inject(Fault(0, Kind.RESCALE, 0.0, False, {"actors": drawn}))
    if told is None:
        assert "one partition has one actor" in done.skipped and not asked
    else:
        assert asked == [("scale", told)] and not done.failed and not done.skipped


# -- what an observer sees


class Published:
    """What a pipeline has published; an observer that has read it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.settings = load_settings(partitions=1, actors=1, **settings)
        self._records: list[Record] = []
        self._read = threading.Event()
        monkeypatch.setattr(observer, "follow", self._follow)
        monkeypatch.setattr(observer, "newest_of_key", lambda *_, **__: None)
        events = self.settings.model_dump(mode="json")
        self.put(self.settings.progress_topic, "run", {"settings": events})

    def put(self, topic: str, key: str, value: dict[str, Any]) -> None:
        self._records.append(Record(topic, 0, len(self._records), key, json.dumps(value).encode(), 0))

    def sent(self, count: int, state: str = "paused") -> ShardSchedule:
        """The shard has sent so many ratings, one a second."""
        schedule = ShardSchedule(RatePlan([Epoch(NOW_MS, 1.0)]), 1.0, 0.5, None)
        last_ms = int(schedule.due_ms(count - 1, 1)[0])
        progress = ShardProgress("r", "c", 0, count, last_ms, NOW_MS, (Epoch(NOW_MS, 1.0),), 1.0, 0.5)
        self.put(self.settings.progress_topic, "shard/0", json.loads(progress.to_json()))
        self.put(self.settings.progress_topic, "generator", {"state": state})
        return schedule

    def job_read(self, records: int, valid: int, newest_ms: int) -> None:
        said = {"records": records, "valid": valid, "next_offset": records, "max_event_ms": newest_ms}
        self.put(self.settings.job_topic, "job", {"batch": 1, "partitions": {"0": said}})

    def posted(self, offset: int, at_ms: int) -> None:
        fields = {"userId": 1, "movieId": 2, "rating": 3.0, "timestamp": at_ms}
        self.put(self.settings.outside_topic, f"0/{offset}", {"partition": 0, "offset": offset, **fields})

    def seen(self) -> Observer:
        found = Observer(self.settings, "", SystemClock())
        found.start()
        assert self._read.wait(30)
        found.stop()
        return found

    def _follow(
        self, _bootstrap: str, _topics: list[str], _from: bool, stop: threading.Event, _starts: object
    ) -> Iterator[list[Record]]:
        yield self._records
        self._read.set()
        while not stop.wait(0.01):
            yield []


def test_data_that_is_broken_on_purpose_comes_to_rest_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(monkeypatch, malformed_share=0.01)
    schedule = published.sent(1_000)
    published.job_read(1_000, 990, int(schedule.due_ms(999, 1)[0]))
    seen = published.seen()
    assert seen.at_rest() and seen.surpluses() == {0: 0}


def test_ratings_from_outside_are_neither_the_shards_nor_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(monkeypatch)
    schedule = published.sent(100)
    for offset in range(10):
        published.posted(offset, NOW_MS)
    published.job_read(100, 100, int(schedule.due_ms(89, 1)[0]))
    seen = published.seen()
    assert not seen.at_rest(), "ten of those that were read are not the shard's"
    assert seen.surpluses() == {0: 0}, "and so ninety of its own are, as many as must be"
    published.job_read(110, 110, int(schedule.due_ms(99, 1)[0]))
    assert published.seen().at_rest()


def test_a_partition_of_which_nothing_can_be_said_is_not_said_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(monkeypatch)
    schedule = published.sent(100)
    assert published.seen().surpluses() == {0: None}, "nothing has been read"
    published.job_read(200, 200, int(schedule.due_ms(199, 1)[0]))
    assert published.seen().surpluses() == {0: None}, "the shard has not said so much yet"
    published.sent(200)
    assert published.seen().surpluses() == {0: 0}
    published.job_read(199, 199, int(schedule.due_ms(199, 1)[0]))
    assert published.seen().surpluses() == {0: -1}


def test_a_record_of_somebody_else_does_not_blind_the_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(monkeypatch)
    published.put(published.settings.metrics_topic, "x", {"window_type": 7})
    published.sent(1)
    assert published.seen().record("generator") == {"state": "paused"}


def test_restarts_are_counted_over_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(monkeypatch)
    topic = published.settings.progress_topic
    published.put(topic, "generator", {"restarts": 2})
    published.put(topic, "pipeline", {"pid": 1, "restarts": {"the broker": 3}})
    seen = published.seen()
    seen.run_ended()
    both = {"generator actors and shards": 2, "the broker": 3, "the run": 1, "Spark, by its watchdog": 0}
    assert seen.restarts() == both, "what the next run counts is still to come"


# -- the command


def chaos(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_rest: Callable[[], Any],
    *outcomes: Outcome,
    more: tuple[Path, ...] = (),
) -> tuple[int, str, dict[str, Any]]:
    """A storm against a pipeline that runs, with what became of it; exit code, output and report."""

    class Passed:
        aborted, duration_s, rate, restarts, windows = "", 60.0, 200.0, dict[str, int](), OPEN
        memory, audits = MemorySeries(), list[Audited]()

    @contextlib.contextmanager
    def passed(*_: object, **__: object) -> Iterator[Any]:
        storm: Any = Passed()
        storm.outcomes, storm.at_rest = list(outcomes), at_rest
        yield storm

    monkeypatch.setattr(storming, "_on_signals", threading.Event)
    monkeypatch.setattr(storming, "_storm", passed)
    monkeypatch.setattr(storming, "active_run", lambda *_: RunInfo(1, 0.0, "127.0.0.1:1", ("generate",)))
    monkeypatch.setattr(storming, "audit", lambda *_: Found())
    report = tmp_path / "report.json"
    flags = [part for file in (*more, report) for part in ("--report", str(file))]
    done = CliRunner().invoke(app, ["chaos", "--state-dir", str(tmp_path), *flags])
    return done.exit_code, done.output, json.loads(report.read_text())


class Found:
    """An audit that agreed."""

    def as_dict(self) -> dict[str, Any]:
        return AGREED


def test_a_pipeline_that_does_not_come_to_rest_leaves_a_report_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_rest() -> Any:
        raise StageFailedError(problem="the windows did not hold all that was sent within 180 s", fix="")

    code, output, report = chaos(tmp_path, monkeypatch, at_rest, outcome(0))
    assert (code, report["verdict"]) == (1, "failed")
    assert "did not hold all that was sent" in report["reason"] and report["reason"] in output
    assert report["faults"]["injected"] == 1


def test_a_storm_that_was_ended_before_it_did_anything_is_unchecked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, report = chaos(tmp_path, monkeypatch, contextlib.nullcontext)
    assert (code, report["verdict"]) == (2, "unchecked") and "nothing was done" in output


def test_what_would_be_lost_after_the_storm_is_refused_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["chaos", "--state-dir", str(tmp_path), *arguments])
        assert done.exit_code == 2
        return done.output

    assert "is a folder" in invoke("--start", "--report", str(tmp_path))
    assert "no folder" in invoke("--start", "--report", str(tmp_path / "missing" / "report.json"))
    assert "--start" in invoke("--faults", "kill-run,rate"), "who did not start the run cannot start it again"
    assert "delivery=at-least-once" in invoke("--start", "--delivery", "at-least-once"), "repeats are its promise"


def test_a_report_that_may_not_be_written_is_refused_before_the_storm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    done = CliRunner().invoke(app, ["chaos", "--state-dir", str(tmp_path), "--report", str(tmp_path / "report.json")])
    assert done.exit_code == 3 and "report.json may not be written" in done.output


def test_a_report_that_cannot_be_written_takes_neither_the_table_nor_the_other_reports_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    code, output, report = chaos(tmp_path, monkeypatch, contextlib.nullcontext, outcome(0), more=(full,))
    assert code == 3 and f"the report cannot be written to {full} (No space left" in output
    assert report["verdict"] == "survived" and "survived" in output


@pytest.mark.parametrize("variable", ["RAY_PIPELINE_USERS", "ray_pipeline_users", "RAY_ADDRESS"])
def test_the_storms_own_pipeline_hears_of_the_environment_by_its_command_alone(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments: list[dict[str, str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: environments.append(env))
    monkeypatch.setenv(variable, "5")
    ChildRun(settings_of({}), tmp_path, 250.0, 3)._launch()
    assert variable not in environments[0] and "PATH" in environments[0]


def given_to_run(child: ChildRun) -> dict[str, Any]:
    """What the command line makes of the command of a storm's own pipeline."""
    start, words = child.command[:4], child.command[4:]
    assert start == [sys.executable, "-m", "ray_pipeline", "run"]
    options = typer.main.get_command(app).commands["run"].make_context("run", words).params  # type: ignore[attr-defined]
    return {n: value for n, value in options.items() if n in Settings.model_fields and value not in (None, [])}


def test_a_pipeline_of_the_storms_own_is_told_all_that_was_set(tmp_path: Path) -> None:
    wanted = {
        "partitions": 8,
        "commit_interval_ms": 500,
        "catalog": tmp_path / "movies.csv",
        "fast": True,
        "ui": False,
        "ratings_topic": "stormed",
        "drift": ("abrupt at=100 size=-1", "abrupt at=900 size=0.5"),
        "clock_skew": "1:-10s",
    }
    child = ChildRun(settings_of({**wanted, "preset": "late-data", "watermark_s": 5}), tmp_path, 250.0, 3)
    said = settings_of(given_to_run(child))
    assert said == child.settings
    assert {name: getattr(said, name) for name in wanted} == wanted
    assert said.late_share > 0, "the preset's"
    assert (said.rate, said.seed, said.state_dir) == (250.0, 3, tmp_path)
    assert (said.watermark_s, said.tumbling_s, said.sliding_s, said.slide_s) == (300, 10, 30, 10), "the storm's"
    as_usual = ChildRun(settings_of({}), tmp_path, 200.0, 1)
    assert "--partitions" not in as_usual.command and "--fast" not in as_usual.command


def test_a_model_file_reaches_the_storms_own_pipeline_without_the_settings_that_it_brings(tmp_path: Path) -> None:
    write_fitted(tmp_path / "model.npz", small_model())
    child = ChildRun(load_settings(model=tmp_path / "model.npz"), tmp_path, 200.0, 1)
    assert settings_of(given_to_run(child)) == child.settings and child.settings.model == tmp_path / "model.npz"


def test_options_settings_file_and_environment_reach_the_storms_own_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[ChildRun] = []

    def start(child: ChildRun) -> RunInfo:
        began.append(child)
        raise StageFailedError(problem="enough is known", fix="")

    monkeypatch.setattr(ChildRun, "start", start)
    monkeypatch.setattr(storming, "_on_signals", threading.Event)
    monkeypatch.setenv("RAY_PIPELINE_USERS", "77")
    file = tmp_path / "settings.toml"
    file.write_text("actors = 1\n")
    arguments = ["--start", "--partitions", "8", "--fast", "--config", str(file), "--state-dir", str(tmp_path)]
    CliRunner().invoke(app, ["chaos", *arguments])
    said = given_to_run(began[0])
    assert (said["partitions"], said["fast"], said["actors"], said["users"]) == ("8", True, "1", "77")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delivery", "at-least-once"),
        ("plan", "ramp(0..500, 10m) then 500"),
        ("duration_s", 60),
        ("bootstrap_servers", "kafka:9092"),
        ("archive", "file:///data/archive"),
    ],
)
def test_what_a_storms_own_pipeline_cannot_be_is_refused_before_it_starts(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"RAY_PIPELINE_{name.upper()}", str(value))
    done = CliRunner().invoke(app, ["chaos", "--start", "--state-dir", str(tmp_path)])
    assert done.exit_code == 2 and f"{name}={value}" in done.output and "does not go with --start" in done.output
    assert not list(tmp_path.glob("chaos-*"))


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
