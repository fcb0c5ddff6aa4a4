"""Plan, shard, runner, coordinator: when a rating is due, and that nothing is lost or repeated on the way."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.clock import SystemClock
from ray_pipeline.codec import decode_value, encode_values
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.delivery.memory import MemoryDelivery, MemoryLog
from ray_pipeline.errors import ConfigurationError, StateMismatchError
from ray_pipeline.generator.coordination import Coordinator
from ray_pipeline.generator.plan import NEVER_MS, RatePlan, ShardSchedule, allocate
from ray_pipeline.generator.runner import Assignment, RunnerState, ShardReport, ShardRunner
from ray_pipeline.generator.shard import Shard
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_movies, build_user_map, build_users
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.restart import Decision, RestartPolicy

START_MS = 1_700_000_000_000
rates = st.floats(0.1, 100_000.0)
shares = st.floats(0.01, 1.0)


@pytest.fixture(scope="module")
def small() -> tuple[Settings, list[ShardModel]]:
    settings = load_settings(users=500, movies=200)
    movies = build_movies(settings, load_catalogue(settings))
    user_map = build_user_map(settings)
    return settings, [ShardModel(settings, p, build_users(settings, user_map.users_of(p)), movies) for p in range(4)]


# -- plan


@given(rate=rates, share=shares, phase=st.floats(0.01, 0.99), seconds=st.floats(0, 10_000))
def test_as_many_are_due_as_rate_times_time(rate: float, share: float, phase: float, seconds: float) -> None:
    schedule = ShardSchedule(RatePlan([Epoch(START_MS, rate)]), share, phase)
    due = schedule.count_due(START_MS + seconds * 1000)
    assert abs(due - rate * share * seconds) <= 1 + 1e-6 * rate * seconds


@given(st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 10_000)), min_size=1, max_size=6), shares)
def test_due_times_invert_the_count_through_any_rate_changes(steps: list[tuple[int, float]], share: float) -> None:
    at, epochs = START_MS, []
    for length, rate in steps:
        epochs.append(Epoch(at, rate))
        at += length
    schedule = ShardSchedule(RatePlan(epochs), share, 0.5)
    times = schedule.due_ms(0, 500)
    assert (np.diff(times) >= 0).all()
    for n in (0, 17, 499):
        if times[n] != NEVER_MS:
            assert schedule.count_due(int(times[n]) + 1) > n
            assert times[n] <= START_MS or schedule.count_due(int(times[n]) - 1) <= n


def test_a_paused_plan_has_nothing_due() -> None:
    plan = RatePlan([Epoch(START_MS, 100.0)]).with_epoch(Epoch(START_MS + 1000, 0.0))
    assert ShardSchedule(plan, 1.0, 0.5).due_ms(99, 2).tolist() == [START_MS + 995, NEVER_MS]
    assert plan.rate_at(START_MS + 500) == 100.0 and plan.rate_at(START_MS + 5000) == 0.0


@given(
    st.lists(shares, min_size=1, max_size=6),
    st.lists(st.integers(0, 5000), min_size=6, max_size=6),
    st.integers(0, 5000),
)
def test_exactly_the_ratings_asked_for_are_shared_out(raw: list[float], starts: list[int], total: int) -> None:
    plan = RatePlan([Epoch(START_MS, 100.0)])
    schedules = [ShardSchedule(plan, s / sum(raw), 0.5) for s in raw]
    ends = allocate(schedules, starts[: len(raw)], total)
    assert sum(ends) - sum(starts[: len(raw)]) == total
    assert all(end >= start for end, start in zip(ends, starts, strict=False))


def test_those_due_first_are_shared_out() -> None:
    plan = RatePlan([Epoch(START_MS, 100.0)])
    schedules = [ShardSchedule(plan, share, 0.5) for share in (0.7, 0.2, 0.1)]
    ends = allocate(schedules, [0, 0, 0], 1000)
    last = max(int(s.due_ms(end - 1, 1)[0]) for s, end in zip(schedules, ends, strict=True))
    first_left_out = min(int(s.due_ms(end, 1)[0]) for s, end in zip(schedules, ends, strict=True))
    assert last <= first_left_out


# -- shard


def test_what_is_sent_does_not_depend_on_batches_or_rate(small: tuple[Settings, list[ShardModel]]) -> None:
    model = small[1][0]
    one = Shard(model, 0.25, 0.5, RatePlan([Epoch(START_MS, 100.0)]), 0, None).take(100)
    shard = Shard(model, 0.25, 0.5, RatePlan([Epoch(START_MS, 100.0)]), 0, None)
    parts = [shard.take(n) for n in (1, 9, 40, 50)]
    assert encode_values(one) == [value for part in parts for value in encode_values(part)]
    fast = Shard(model, 0.25, 0.5, RatePlan([Epoch(START_MS, 10_000.0)]), 0, None).take(100)
    assert (fast.user_ids == one.user_ids).all() and (fast.half_stars == one.half_stars).all()


def test_a_rating_that_was_taken_keeps_its_time_when_the_rate_changes(small: tuple[Settings, list[ShardModel]]) -> None:
    shard = Shard(small[1][0], 1.0, 0.5, RatePlan([Epoch(START_MS, 100.0)]), 0, None)
    taken = shard.take(200)
    lived = shard.change_rate(Epoch(START_MS + 1000, 10.0))  # in the past of what was taken
    assert lived.from_ms == taken.timestamps_ms[-1] + 1
    again = Shard(small[1][0], 1.0, 0.5, shard.plan, 0, None).take(200)
    assert (again.timestamps_ms == taken.timestamps_ms).all()
    assert shard.next_due_ms() >= taken.timestamps_ms[-1]


# -- runner


def run_shard(model: ShardModel, log: MemoryLog, total: int, rate: float = 1e6, start_index: int = 0) -> ShardReport:
    clock = SystemClock()
    policy = RestartPolicy(first_backoff_s=0.001, longest_backoff_s=0.01)
    runner = ShardRunner(model, lambda: MemoryDelivery(log, model.partition), 10, clock, policy)
    runner.start()
    begun = False
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        report = runner.report()
        if report.state is RunnerState.READY and not begun:
            begun = True
            plan = (Epoch(START_MS, rate),)
            offset = START_MS - clock.now_ms()
            runner.begin(Assignment("run", "config", plan, 1.0, 0.5, total, offset))
        if report.state in (RunnerState.DONE, RunnerState.FAILED):
            break
        threading.Event().wait(0.002)
    runner.stop()
    assert runner.join(5)
    return report


@pytest.mark.parametrize(
    "failures",
    [
        [],
        ["open"],
        ["send"],
        ["commit"],
        ["commit, done"],
        ["open", "send", "commit", "commit, done", "open", "commit, done"],
    ],
    ids=", ".join,
)
def test_every_rating_is_delivered_once_whatever_fails(
    small: tuple[Settings, list[ShardModel]], failures: list[str]
) -> None:
    log = MemoryLog()
    log.failures = list(failures)
    model, total = small[1][1], 3_000
    report = run_shard(model, log, total)
    assert report.state is RunnerState.DONE and report.next_index == total
    assert report.failures == len(failures)
    drawn = model.draw(0, total)
    sent = [decode_value(value) for _, value in log.ratings[1]]
    assert [r["userId"] for r in sent] == drawn.user_ids.tolist()
    assert [r["rating"] * 2 for r in sent] == drawn.half_stars.tolist()
    assert log.progress[1].next_index == total


def test_a_runner_that_keeps_failing_gives_up_and_says_why(small: tuple[Settings, list[ShardModel]]) -> None:
    log = MemoryLog()
    log.failures = ["open"] * 50
    report = run_shard(small[1][0], log, 10)
    assert report.state is RunnerState.FAILED and "no answer" in report.error


def test_a_fenced_runner_stops_and_leaves_the_field(small: tuple[Settings, list[ShardModel]]) -> None:
    log = MemoryLog()
    model = small[1][0]
    runner = ShardRunner(model, lambda: MemoryDelivery(log, 0), 10, SystemClock(), RestartPolicy())
    runner.start()
    deadline = time.monotonic() + 10
    while runner.report().state is not RunnerState.READY and time.monotonic() < deadline:
        threading.Event().wait(0.002)
    successor = MemoryDelivery(log, 0)
    successor.open(1)
    runner.begin(Assignment("run", "config", (Epoch(START_MS, 1000.0),), 1.0, 0.5, None, 0))
    while runner.report().state is not RunnerState.FAILED and time.monotonic() < deadline:
        threading.Event().wait(0.002)
    assert "successor" in runner.report().error
    assert log.ratings[0] == []


def test_a_restart_policy_allows_bursts_and_ends_loops() -> None:
    policy = RestartPolicy(most=3, span_ms=1000)
    assert [policy.failed(t) for t in (0, 10, 20)] == [Decision.RESTART] * 3
    assert policy.failed(30) is Decision.GIVE_UP
    assert policy.failed(5000) is Decision.RESTART


# -- coordinator


def ready(partition: int, progress: ShardProgress | None = None) -> ShardReport:
    next_index = progress.next_index if progress else 0
    return ShardReport(partition, RunnerState.READY, next_index, progress, (), 0.0, 0, "")


def coordinator(**changes: object) -> Coordinator:
    found = Coordinator(load_settings(partitions=2, **changes), "config", [0.5, 0.5])
    found.observe([ready(0), ready(1)])
    return found


def test_nothing_is_assigned_before_all_shards_are_ready() -> None:
    found = Coordinator(load_settings(partitions=2), "config", [0.5, 0.5])
    found.observe([ready(0)])
    assert found.assignments(START_MS) == {}
    found.observe([ready(1)])
    assert sorted(found.assignments(START_MS)) == [0, 1]


def test_a_second_run_goes_on_after_a_pause() -> None:
    found = Coordinator(load_settings(partitions=2, ratings=100), "config", [0.5, 0.5])
    last = START_MS + 10_000
    before = [ShardProgress("r1", "config", p, 500, last, last, (Epoch(START_MS, 100.0),), 0.5, 0.5) for p in range(2)]
    found.observe([ready(0, before[0]), ready(1, before[1])])
    told = found.assignments(last + 60_000)
    assert found.run == "r1" and found.totals().base == 1000
    assert sum(a.end_index or 0 for a in told.values()) == 1100
    plan = RatePlan(told[0].epochs)
    assert [plan.rate_at(t) for t in (last - 1, last + 30_000, last + 60_000)] == [100.0, 0.0, 100.0]
    first = ShardSchedule(plan, 0.5, told[0].phase).due_ms(500, 1)[0]
    assert last + 60_000 <= first <= last + 60_100


def test_progress_of_another_configuration_is_refused() -> None:
    found = Coordinator(load_settings(partitions=2), "config", [0.5, 0.5])
    other = ShardProgress("r1", "other", 0, 5, START_MS, START_MS, (Epoch(START_MS, 100.0),), 0.5, 0.5)
    found.observe([ready(0, other), ready(1)])
    with pytest.raises(StateMismatchError, match="another configuration"):
        found.assignments(START_MS)


def test_a_bounded_duration_follows_rate_changes() -> None:
    found = coordinator(duration_s=10, rate=100)
    found.assignments(START_MS)
    assert found.requested == 1000
    found.change(START_MS + 4_800, rate=200.0)  # takes effect 0.2 s later
    assert found.requested == 500 + 1000
    found.change(START_MS + 7_800, paused=True)
    assert found.requested == 500 + 600
    assert found.change(START_MS + 7_900, rate=5.0) is None  # while paused
    with pytest.raises(ConfigurationError, match="above 0"):
        found.change(START_MS, rate=float("nan"))


def test_a_fixed_event_clock_starts_where_it_is_told() -> None:
    found = coordinator(start_time_ms=1_000_000_000_000)
    told = found.assignments(START_MS)
    assert told[0].epochs[0].from_ms == 1_000_000_000_000
    assert START_MS + told[0].clock_offset_ms == 1_000_000_000_000


def test_a_partition_without_users_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="users"):
        Coordinator(load_settings(partitions=2), "config", [1.0, 0.0])
