"""Plan, shard, runner, coordinator: when a rating is due, and that nothing is lost or repeated on the way."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ray_pipeline.clock import Clock, FakeClock, SystemClock
from ray_pipeline.codec import decode_value, encode_values
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.delivery.memory import MemoryDelivery, MemoryLog
from ray_pipeline.errors import ConfigurationError, NotAllowedError, StateMismatchError
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.coordination import Coordinator
from ray_pipeline.generator.event_clock import EventClock
from ray_pipeline.generator.placement import HAND_OVER_MS, Placement
from ray_pipeline.generator.plan import NEVER_MS, RatePlan, ShardSchedule, allocate
from ray_pipeline.generator.runner import Assignment, RunnerState, ShardReport, ShardRunner
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.generator.shard import Shard
from ray_pipeline.generator.standing import Standing
from ray_pipeline.kafka.client import RIGHTS
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_movies, build_user_map, build_users
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.restart import Decision, RestartPolicy
from ray_pipeline.truth.replay import ShardReplay

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


# -- plan: the past as it was lived, the future as it is wanted

steps = st.lists(st.tuples(st.integers(1, 20_000), st.floats(0, 2_000)), min_size=1, max_size=6)


def plan_of(changes: list[tuple[int, float]]) -> RatePlan:
    at, epochs = START_MS, []
    for length, rate in changes:
        epochs.append(Epoch(at, rate))
        at += length
    return RatePlan(epochs)


@given(wanted=steps, lived=steps, through=st.integers(-10, 60_000))
def test_a_plan_with_another_past_is_each_of_them_on_its_side(
    wanted: list[tuple[int, float]], lived: list[tuple[int, float]], through: int
) -> None:
    plan, past, through_ms = plan_of(wanted), plan_of(lived), START_MS + through
    found = plan.with_past(past, through_ms)
    for at_ms in (START_MS, through_ms - 7, through_ms):
        assert found.rate_at(min(at_ms, through_ms)) == past.rate_at(min(at_ms, through_ms))
    for epoch in plan.epochs:
        assert found.rate_at(max(epoch.from_ms, through_ms + 1)) == plan.rate_at(max(epoch.from_ms, through_ms + 1))
    assert found.epochs[-1].rate == plan.rate_at(2**50)
    assert found.with_past(past, through_ms).epochs == found.epochs


@given(wanted=steps, lived=steps, taken=st.integers(0, 3_000), share=shares, phase=st.floats(0.01, 0.99))
def test_no_rating_that_was_taken_changes_its_time(
    wanted: list[tuple[int, float]], lived: list[tuple[int, float]], taken: int, share: float, phase: float
) -> None:
    schedule = ShardSchedule(plan_of(lived), share, phase)
    before = schedule.due_ms(0, taken + 1)
    taken = int(np.count_nonzero(before[:taken] != NEVER_MS))  # only what is due can be taken
    found = schedule.going_on(plan_of(wanted), taken)
    assert (found.due_ms(0, taken) == before[:taken]).all()
    assert found.plan.epochs[-1].rate == plan_of(wanted).epochs[-1].rate
    times = found.due_ms(0, taken + 100)
    assert (np.diff(times) >= 0).all()


@pytest.mark.parametrize(
    ("rate", "share", "phase", "taken"),
    [(60.0, 0.5, 0.5, 3_955_007), (100.0, 0.7, 0.25, 4_686_275), (1000.0, 0.5, 0.5, 4_186_142)],
)
def test_a_rating_at_the_very_end_of_its_millisecond_stays_there(
    rate: float, share: float, phase: float, taken: int
) -> None:
    schedule = ShardSchedule(RatePlan([Epoch(START_MS, rate)]), share, phase)
    last_ms = int(schedule.due_ms(taken - 1, 1)[0])
    paused = RatePlan([Epoch(START_MS, 0.0)])
    rounded = ShardSchedule(paused.with_past(schedule.plan, last_ms), share, phase)
    assert int(rounded.due_ms(taken - 1, 1)[0]) == NEVER_MS  # the last bit of a sum: this is what is guarded against
    found = schedule.going_on(paused, taken)
    assert int(found.due_ms(taken - 1, 1)[0]) == last_ms
    assert int(found.due_ms(taken, 1)[0]) == NEVER_MS


# -- shard


def shard_of(model: ShardModel, rate: float = 100.0, share: float = 0.25) -> Shard:
    return Shard(model, share, 0.5, RatePlan([Epoch(START_MS, rate)]), None)


def test_what_is_sent_does_not_depend_on_batches_or_rate(small: tuple[Settings, list[ShardModel]]) -> None:
    model = small[1][0]
    one = shard_of(model).take(100)
    shard = shard_of(model)
    parts = [shard.take(n) for n in (1, 9, 40, 50)]
    assert encode_values(one) == [value for part in parts for value in encode_values(part)]
    fast = shard_of(model, 10_000.0).take(100)
    assert (fast.user_ids == one.user_ids).all() and (fast.half_stars == one.half_stars).all()


def test_a_change_that_comes_late_takes_effect_after_what_was_taken(small: tuple[Settings, list[ShardModel]]) -> None:
    shard = shard_of(small[1][0], share=1.0)
    taken = shard.take(200)
    wanted = shard.plan.with_epoch(Epoch(START_MS + 1000, 10.0))  # in the past of what was taken
    shard.follow(wanted, None)
    last_ms = int(taken.timestamps_ms[-1])
    assert shard.plan.epochs == (Epoch(START_MS, 100.0), Epoch(last_ms + 1, 10.0))
    assert shard.next_due_ms() > last_ms
    # and stays there when it hears of a later change, or of the same again
    shard.follow(wanted.with_epoch(Epoch(START_MS + 9000, 500.0)), None)
    assert [e.rate for e in shard.plan.epochs] == [100.0, 10.0, 500.0]
    shard.resume(Standing(None, None))
    assert (shard.take(200).timestamps_ms == taken.timestamps_ms).all()


def test_a_new_shard_keeps_what_another_lived_and_committed(small: tuple[Settings, list[ShardModel]]) -> None:
    wanted = RatePlan([Epoch(START_MS, 100.0), Epoch(START_MS + 1000, 10.0)])
    late = shard_of(small[1][0], share=1.0)
    late.take(200)  # up to 2 s, before it heard
    late.follow(wanted, None)
    committed = ShardProgress("r", "c", 0, 200, late.last_event_ms, START_MS, late.plan.epochs, 1.0, 0.5)
    successor = Shard(small[1][0], 1.0, 0.5, wanted, None)
    successor.resume(Standing(committed, committed))
    assert successor.plan.epochs == late.plan.epochs
    assert (successor.take(50).timestamps_ms == late.take(50).timestamps_ms).all()


def test_a_progress_record_that_contradicts_itself_is_refused(small: tuple[Settings, list[ShardModel]]) -> None:
    forged = ShardProgress("r", "c", 0, 200, START_MS + 5, START_MS, (Epoch(START_MS, 100.0),), 1.0, 0.5)
    with pytest.raises(StateMismatchError, match="contradicts itself"):
        Standing.of(small[1][0], forged, [])


# -- runner


def assignment(revision: int = 1, rate: float = 1e6, end: int | None = None, offset_ms: int = 0) -> Assignment:
    clock = EventClock(offset_ms, 0)
    return Assignment(revision, "run", "config", (Epoch(START_MS, rate),), 1.0, 0.5, end, clock)


def runner_of(model: ShardModel, log: MemoryLog, clock: Clock, policy: RestartPolicy | None = None) -> ShardRunner:
    return ShardRunner(
        model.partition,
        lambda: model,
        lambda: MemoryDelivery(log, model.partition),
        10,
        clock,
        policy or RestartPolicy(),
    )


def take_steps(runner: ShardRunner, clock: FakeClock, until: RunnerState, most: int = 2_000) -> ShardReport:
    for _ in range(most):
        if runner.report().state is until:
            return runner.report()
        clock.advance(runner.step() or 0.0)
    raise AssertionError(f"{runner.report()} is not {until}")


@pytest.mark.parametrize(
    "failures",
    [
        [],
        ["open"],
        ["send"],
        ["commit"],
        ["commit, done"],
        ["open", "send", "commit", "commit, done", "open", "commit, done"],
        ["commit, ratings alone"],
        ["commit, done", "commit, progress alone", "commit, ratings alone", "commit, ratings alone"],
    ],
    ids=", ".join,
)
def test_every_rating_is_delivered_once_whatever_fails(
    small: tuple[Settings, list[ShardModel]], failures: list[str]
) -> None:
    log, clock = MemoryLog(), FakeClock(START_MS)
    log.failures = list(failures)
    model, total = small[1][1], 10_000
    runner = runner_of(model, log, clock)
    runner.tell(assignment(end=total))
    report = take_steps(runner, clock, RunnerState.DONE)
    assert report.next_index == total and report.failures == len(failures)
    drawn = model.draw(0, total)
    sent = [decode_value(value) for _, value in log.ratings[1]]
    assert [r["userId"] for r in sent] == drawn.user_ids.tolist()
    assert [r["rating"] * 2 for r in sent] == drawn.half_stars.tolist()
    assert log.progress[1].next_index == total


@pytest.mark.parametrize("foreign", [b"not a rating", None, "an old one again"], ids=str)
@pytest.mark.parametrize("lost", [1, 203, 3_000])
def test_what_a_broker_lost_is_sent_again_with_the_times_it_had(
    small: tuple[Settings, list[ShardModel]], lost: int, foreign: bytes | str | None
) -> None:
    log, clock, model = MemoryLog(), FakeClock(START_MS), small[1][1]
    runner = runner_of(model, log, clock)
    runner.tell(assignment(rate=1000.0, end=3_000))
    take_steps(runner, clock, RunnerState.DONE)
    before = list(log.ratings[1])
    del log.ratings[1][-lost:]
    if foreign is not None and log.ratings[1]:
        log.ratings[1].append((b"1", before[7][1] if isinstance(foreign, str) else foreign))
    after = runner_of(model, log, clock)
    after.tell(assignment(rate=5000.0, end=4_000))  # another rate from here on does not change what was lived
    assert take_steps(after, clock, RunnerState.DONE).next_index == 4_000
    kept = len(before) - lost
    if kept:
        del log.ratings[1][kept : kept + (foreign is not None)]
    assert log.ratings[1][: len(before)] == before and len(log.ratings[1]) == 4_000


def test_what_arrived_without_its_progress_is_not_sent_again(small: tuple[Settings, list[ShardModel]]) -> None:
    log, clock, model = MemoryLog(), FakeClock(START_MS), small[1][1]
    runner = runner_of(model, log, clock)
    runner.tell(assignment(rate=1000.0, end=2_000))
    take_steps(runner, clock, RunnerState.DONE)
    early = log.progress[1]
    runner.tell(assignment(revision=2, rate=1000.0, end=3_000))
    take_steps(runner, clock, RunnerState.RUNNING)
    take_steps(runner, clock, RunnerState.DONE)
    log.progress[1] = early
    after = runner_of(model, log, clock)
    after.tell(assignment(rate=5000.0, end=4_000))
    take_steps(after, clock, RunnerState.DONE)
    sent = [decode_value(value) for _, value in log.ratings[1]]
    assert [r["userId"] for r in sent] == model.draw(0, 4_000).user_ids.tolist()
    assert [r["timestamp"] - START_MS for r in sent[:3_000]] == pytest.approx(np.arange(3_000) + 0.5, abs=1)


@hypothesis_settings(max_examples=15)
@given(
    said=st.integers(2_001, 3_000),
    lost=st.integers(0, 400),
    copied=st.lists(st.tuples(st.integers(0, 1_300), st.integers(1, 700)), max_size=4),
)
def test_copies_of_old_ratings_behind_the_newest_do_not_make_a_shard_send_anything_again(
    small: tuple[Settings, list[ShardModel]], said: int, lost: int, copied: list[tuple[int, int]]
) -> None:
    model, plan = small[1][1], RatePlan([Epoch(START_MS, 1000.0)])
    sequence = ShardSequence(model, ShardSchedule(plan, 1.0, 0.5), said)
    log, held = MemoryLog(), 3_000 - lost
    values = encode_values(sequence.events(0, held))
    for first, count in copied:
        values += values[first : first + count]
    log.ratings[1] = [(b"", value) for value in values]
    log.progress[1] = ShardProgress(
        "run", "config", 1, said, sequence.due_ms(said - 1), START_MS, plan.epochs, 1.0, 0.5
    )
    runner = runner_of(model, log, FakeClock(START_MS))
    runner.step()
    assert runner.report().next_index == held


def test_a_shard_whose_progress_is_gone_does_not_begin_anew_behind_its_own_ratings(
    small: tuple[Settings, list[ShardModel]],
) -> None:
    log, clock, model = MemoryLog(), FakeClock(START_MS), small[1][1]
    runner = runner_of(model, log, clock)
    runner.tell(assignment(rate=1000.0, end=3_000))
    take_steps(runner, clock, RunnerState.DONE)
    for kept in (3_000, 2):
        log.ratings[1] = log.ratings[1][:kept]
        log.progress.clear()  # the topic was deleted, or another one was named
        after = runner_of(model, log, clock)
        after.tell(assignment(rate=1000.0, end=4_000))
        report = take_steps(after, clock, RunnerState.FAILED)
        assert "holds ratings of this stream" in report.error and "--progress-topic" in report.error
        assert len(log.ratings[1]) == kept and not log.progress


def test_what_somebody_else_wrote_before_the_first_run_is_no_obstacle(
    small: tuple[Settings, list[ShardModel]],
) -> None:
    log, clock, model = MemoryLog(), FakeClock(START_MS), small[1][1]
    others = encode_values(ShardSequence(model, ShardSchedule(RatePlan([Epoch(1, 1.0)]), 1.0, 0.5), 0).events(50, 40))
    log.ratings[1] = [(b"1", value) for value in (*others, None, b"not a rating")]
    runner = runner_of(model, log, clock)
    runner.tell(assignment(rate=1000.0, end=100))
    assert take_steps(runner, clock, RunnerState.DONE).next_index == 100
    assert len(log.ratings[1]) == 42 + 100


@pytest.mark.parametrize("change", [False, True], ids=["same rate", "in the commit of a change of rate"])
@pytest.mark.parametrize("half", ["ratings alone", "progress alone", "ratings first", "progress first"])
def test_ratings_whose_commit_was_kept_by_halves_have_the_times_of_their_own_run_in_the_next_one(
    small: tuple[Settings, list[ShardModel]], half: str, change: bool
) -> None:
    log, clock, model = MemoryLog(), FakeClock(START_MS), small[1][1]
    runner = runner_of(model, log, clock)
    runner.tell(assignment(rate=1000.0))
    take_steps(runner, clock, RunnerState.RUNNING)
    runner.step()
    assert log.progress[1].next_index == len(log.ratings[1]) == 0  # the plan is on record before the first rating
    clock.advance(0.005)
    runner.step()
    clock.advance(0.005)
    if change:
        runner.tell(dataclasses.replace(assignment(2), epochs=(Epoch(START_MS, 1000.0), Epoch(START_MS + 9, 5.0))))
    log.failures = [f"commit, {half}"]
    runner.step()
    first = max(log.progress[1].next_index, len(log.ratings[1]))
    assert first == (5 if change else 10) and {log.progress[1].next_index, len(log.ratings[1])} == {0, first}
    after = runner_of(model, log, clock)  # the next run, which begins an hour later, at another rate
    clock.advance(3600)
    plan = (Epoch(START_MS, 1000.0), Epoch(START_MS + 10, 0.0), Epoch(clock.now_ms(), 250.0))
    after.tell(dataclasses.replace(assignment(end=1_000), epochs=plan))
    after.step()
    found = after.report()
    assert found.progress is not None and found.next_index == found.progress.next_index == len(log.ratings[1])
    take_steps(after, clock, RunnerState.DONE)
    replayed = ShardReplay(model, log.progress[1]).events(0, 1_000)
    assert [value for _, value in log.ratings[1]] == encode_values(replayed)
    assert (replayed.timestamps_ms[:first] - START_MS).tolist() == list(range(first))
    assert replayed.timestamps_ms[10] >= plan[-1].from_ms


def test_a_shard_that_was_told_but_has_not_begun_does_not_pass_for_one_that_is_on_time(
    small: tuple[Settings, list[ShardModel]],
) -> None:
    log, clock = MemoryLog(), FakeClock(START_MS + 1_800_000)
    runner = runner_of(small[1][0], log, clock)
    take_steps(runner, clock, RunnerState.READY)
    runner.tell(assignment(rate=1000.0))
    assert (runner.report().revision, runner.report().behind_s) == (0, 0.0)
    runner.step()
    assert runner.report().revision == 1 and runner.report().behind_s == pytest.approx(1_800, abs=1)


def test_a_plan_that_the_broker_took_back_is_on_record_before_a_rating_is_sent_by_it(
    small: tuple[Settings, list[ShardModel]],
) -> None:
    """A broker that is killed twice: it forgets the plan's commit, and then the progress of the ratings sent by it."""
    log, clock, model = MemoryLog(), FakeClock(START_MS), small[1][1]
    log.failures = ["commit, nothing first", "commit, ratings first"]
    runner = runner_of(model, log, clock)
    runner.tell(assignment(rate=1000.0))
    for _ in range(10):
        runner.step()
        clock.advance(0.005)
        if not log.failures:
            break
    after = runner_of(model, log, clock)  # the next run, at another rate
    after.tell(dataclasses.replace(assignment(end=1_000), epochs=(Epoch(START_MS, 250.0),)))
    take_steps(after, clock, RunnerState.DONE)
    replayed = ShardReplay(model, log.progress[1]).events(0, 1_000)
    assert [value for _, value in log.ratings[1]] == encode_values(replayed)


def test_a_plan_that_is_told_while_a_step_is_under_way_is_confirmed_by_the_commit_that_carries_it(
    small: tuple[Settings, list[ShardModel]],
) -> None:
    """The broker takes that commit back, and of the next one it keeps the ratings alone."""
    told: list[Assignment] = []

    class Telling(MemoryDelivery):
        def send(self, batch: EventBatch) -> None:
            super().send(batch)
            while told:
                runner.tell(told.pop())

    log, clock, model = MemoryLog(), FakeClock(START_MS), small[1][1]
    runner = ShardRunner(1, lambda: model, lambda: Telling(log, 1), 10, clock, RestartPolicy())
    runner.tell(assignment(rate=1000.0))
    take_steps(runner, clock, RunnerState.RUNNING)
    runner.step()
    clock.advance(0.02)
    told.append(dataclasses.replace(assignment(2), epochs=(Epoch(START_MS, 1000.0), Epoch(START_MS + 21, 300.0))))
    log.failures = ["commit, nothing first", "commit, ratings first"]
    runner.step()
    assert not told and runner.report().failures == 1
    for _ in range(20):
        clock.advance(0.005)
        runner.step()
    assert not log.failures
    after = runner_of(model, log, clock)  # the next run, at another rate
    after.tell(dataclasses.replace(assignment(end=1_000), epochs=(Epoch(START_MS, 250.0),)))
    take_steps(after, clock, RunnerState.DONE)
    replayed = ShardReplay(model, log.progress[1]).events(0, 1_000)
    assert [value for _, value in log.ratings[1]] == encode_values(replayed)


def test_a_delivery_that_cannot_even_be_closed_is_replaced(small: tuple[Settings, list[ShardModel]]) -> None:
    class Stubborn(MemoryDelivery):
        def close(self) -> None:
            raise RuntimeError("fatal error from before")

    log, clock, model = MemoryLog(), FakeClock(START_MS), small[1][0]
    log.failures = ["commit"]
    runner = ShardRunner(0, lambda: model, lambda: Stubborn(log, 0), 10, clock, RestartPolicy())
    runner.tell(assignment(end=100))
    assert take_steps(runner, clock, RunnerState.DONE).next_index == len(log.ratings[0]) == 100


def test_a_runner_works_on_a_thread_of_its_own(small: tuple[Settings, list[ShardModel]]) -> None:
    log, clock = MemoryLog(), SystemClock()
    runner = runner_of(small[1][1], log, clock)
    runner.tell(assignment(end=3_000, offset_ms=START_MS - clock.now_ms()))
    runner.start()
    deadline = time.monotonic() + 20
    while runner.report().state is not RunnerState.DONE and time.monotonic() < deadline:
        threading.Event().wait(0.002)
    runner.stop()
    assert runner.join(5)
    assert runner.report().state is RunnerState.DONE and len(log.ratings[1]) == 3_000


def test_a_runner_on_a_leash_sends_no_further_and_goes_on_when_it_is_let_go(
    small: tuple[Settings, list[ShardModel]],
) -> None:
    log, clock = MemoryLog(), FakeClock(START_MS + 100_000)
    runner = runner_of(small[1][1], log, clock)
    runner.tell(assignment(rate=100.0), leash_ms=START_MS + 7_000)
    take_steps(runner, clock, RunnerState.RUNNING)
    for _ in range(50):
        clock.advance(runner.step() or 0.0)
    report = runner.report()
    assert report.next_index == len(log.ratings[1]) == 700
    assert report.waiting_ms == START_MS + 7_005 and report.behind_s > 90
    runner.tell(None)
    for _ in range(50):
        clock.advance(runner.step() or 0.0)
    assert runner.report().next_index > 10_000


def test_a_runner_that_keeps_failing_gives_up_and_says_why(small: tuple[Settings, list[ShardModel]]) -> None:
    log, clock = MemoryLog(), FakeClock()
    log.failures = ["open"] * 50
    runner = runner_of(small[1][0], log, clock, RestartPolicy(span_ms=10**9))
    report = take_steps(runner, clock, RunnerState.FAILED)
    assert "no answer" in report.error


def test_a_runner_that_lacks_a_right_gives_up_at_once(
    small: tuple[Settings, list[ShardModel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotAllowedError("shard 0: open: not authorised", RIGHTS)

    log, clock = MemoryLog(), FakeClock()
    runner = runner_of(small[1][0], log, clock)
    monkeypatch.setattr(MemoryDelivery, "open", refuse)
    assert runner.step() is None
    report = runner.report()
    assert (report.state, report.failures) == (RunnerState.FAILED, 0) and RIGHTS in report.error


def test_a_fenced_runner_stays_out_until_it_is_told_to_begin_again(small: tuple[Settings, list[ShardModel]]) -> None:
    log, clock, model = MemoryLog(), FakeClock(START_MS), small[1][0]
    zombie, successor = runner_of(model, log, clock), runner_of(model, log, clock)
    zombie.tell(assignment(rate=1000.0))
    take_steps(zombie, clock, RunnerState.RUNNING)
    clock.advance(1)
    zombie.step()
    successor.tell(assignment(rate=1000.0, end=5_000))
    take_steps(successor, clock, RunnerState.RUNNING)
    take_steps(zombie, clock, RunnerState.FENCED)
    clock.advance(60)
    for _ in range(100):
        zombie.step()
        successor.step()
    assert zombie.report().state is RunnerState.FENCED and "successor" in zombie.report().error
    assert successor.report().state is RunnerState.DONE
    # told again, it shuts the other one out and goes on from what that one committed
    zombie.tell(assignment(revision=2, rate=1000.0, end=6_000))
    assert take_steps(zombie, clock, RunnerState.DONE).next_index == 6_000
    assert len(log.ratings[0]) == 6_000
    successor.tell(assignment(revision=2, rate=1000.0, end=6_000))
    take_steps(successor, clock, RunnerState.FENCED)


def test_a_shard_that_is_fenced_for_ever_is_given_up_with_the_likely_cause(
    small: tuple[Settings, list[ShardModel]],
) -> None:
    log, clock, model = MemoryLog(), FakeClock(START_MS), small[1][0]
    runner = runner_of(model, log, clock)
    runner.tell(assignment(rate=1000.0))
    for _ in range(200):
        if runner.report().state is RunnerState.RUNNING:
            MemoryDelivery(log, 0).open(1)  # a second pipeline
        clock.advance(runner.step() or 0.0)
        runner.tell(None)
    assert runner.report().state is RunnerState.FAILED and "second pipeline" in runner.report().error


def test_a_runner_that_is_done_goes_on_when_its_end_is_moved(small: tuple[Settings, list[ShardModel]]) -> None:
    log, clock = MemoryLog(), FakeClock(START_MS)
    runner = runner_of(small[1][0], log, clock)
    runner.tell(assignment(end=100))
    take_steps(runner, clock, RunnerState.DONE)
    runner.tell(assignment(revision=2, end=250))
    assert take_steps(runner, clock, RunnerState.RUNNING).revision == 2
    assert take_steps(runner, clock, RunnerState.DONE).next_index == 250
    runner.stop()
    assert runner.step() is None and runner.report().state is RunnerState.DONE


@pytest.mark.parametrize("failure", ["commit", "commit, done"])
def test_a_runner_that_is_stopped_knows_what_it_committed(
    small: tuple[Settings, list[ShardModel]], failure: str
) -> None:
    log, clock = MemoryLog(), FakeClock(START_MS)
    runner = runner_of(small[1][0], log, clock)
    runner.tell(assignment(rate=1000.0))
    take_steps(runner, clock, RunnerState.RUNNING)
    runner.step()
    clock.advance(0.5)
    log.failures = [failure]
    runner.stop()
    report = take_steps(runner, clock, RunnerState.STOPPED)
    assert report.next_index == len(log.ratings[0]) == log.progress[0].next_index


def test_a_restart_policy_allows_bursts_and_ends_loops() -> None:
    policy = RestartPolicy(most=3, span_ms=1000)
    assert [policy.failed(t) for t in (0, 10, 20)] == [Decision.RESTART] * 3
    assert policy.failed(30) is Decision.GIVE_UP
    assert policy.failed(5000) is Decision.RESTART


@given(st.lists(st.integers(0, 700), max_size=60), st.integers(1, 6))
def test_a_restart_policy_gives_up_when_there_were_too_many_failures_in_its_span(waits: list[int], most: int) -> None:
    policy, failures = RestartPolicy(most=most, span_ms=1000, first_backoff_s=0.1, longest_backoff_s=2.0), [0]
    for wait in waits:
        failures.append(failures[-1] + wait)
        recent = sum(at >= failures[-1] - 1000 for at in failures[1:])
        assert (policy.failed(failures[-1]) is Decision.GIVE_UP) == (recent > most)
        assert 0.1 <= policy.backoff_s <= 2.0


# -- coordinator


def ready(partition: int, progress: ShardProgress | None = None) -> ShardReport:
    next_index = progress.next_index if progress else 0
    return ShardReport(partition, RunnerState.READY, 0, next_index, progress, 0.0, 0, "")


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


@pytest.mark.parametrize("fixed_ms", [None, 1_000_000_000_000])
def test_a_run_that_died_before_its_first_rating_is_begun_afresh(fixed_ms: int | None) -> None:
    found = Coordinator(load_settings(partitions=2, start_time_ms=fixed_ms), "config", [0.5, 0.5])
    before = ShardProgress("r1", "config", 0, 0, None, START_MS, (Epoch(fixed_ms or START_MS, 50.0),), 0.5, 0.25)
    found.observe([ready(0, before), ready(1)])
    told = found.assignments(START_MS + 3_600_000)
    assert found.run == "r1"
    assert {a.epochs for a in told.values()} == {(Epoch(fixed_ms or START_MS + 3_600_000, 100.0),)}


def test_a_shard_that_missed_a_whole_run_has_nothing_due_in_the_pause_before_it(
    small: tuple[Settings, list[ShardModel]],
) -> None:
    hour_ms = 3_600_000
    old = (Epoch(START_MS, 100.0),)
    new = (*old, Epoch(START_MS + 10_001, 0.0), Epoch(START_MS + hour_ms, 100.0))
    found = Coordinator(load_settings(partitions=2), "config", [0.5, 0.5])
    missed = ShardProgress("r1", "config", 0, 500, START_MS + 9_985, START_MS, old, 0.5, 0.25)
    went_on = ShardProgress("r1", "config", 1, 1_000, START_MS + hour_ms + 10_000, START_MS, new, 0.5, 0.75)
    found.observe([ready(0, missed), ready(1, went_on)])
    told = found.assignments(START_MS + 2 * hour_ms)[0]
    shard = Shard(small[1][0], told.share, told.phase, RatePlan(told.epochs), None)
    shard.resume(Standing(missed, missed))
    times = shard.take(501).timestamps_ms - START_MS
    assert hour_ms <= times[0] and times[498] < hour_ms + 10_001 and times[500] >= 2 * hour_ms


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
    found.change(START_MS + 7_900, rate=5.0)  # while paused
    assert found.requested == 500 + 600
    with pytest.raises(ConfigurationError, match="above 0"):
        found.change(START_MS, rate=float("nan"))


def test_a_fixed_event_clock_starts_where_it_is_told() -> None:
    found = coordinator(start_time_ms=1_000_000_000_000)
    told = found.assignments(START_MS)
    assert told[0].epochs[0].from_ms == 1_000_000_000_000
    assert told[0].clock.event_ms(START_MS) == 1_000_000_000_000


def test_a_partition_without_users_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="users"):
        Coordinator(load_settings(partitions=2), "config", [1.0, 0.0])


def test_a_change_is_told_until_it_is_known_and_a_report_from_before_does_not_undo_it() -> None:
    found = coordinator(rate=100)
    told = found.assignments(START_MS)
    running = [dataclasses.replace(ready(p), state=RunnerState.RUNNING, revision=told[p].revision) for p in range(2)]
    found.observe(running)
    assert found.assignments(START_MS) == {}
    found.change(START_MS + 1_000, rate=500.0)
    found.observe(running)  # made before they heard
    again = found.assignments(START_MS + 1_100)
    assert sorted(again) == [0, 1]
    # the first has heard; the second died, and its successor knows nothing
    found.observe([dataclasses.replace(running[0], revision=again[0].revision)])
    found.observe([dataclasses.replace(ready(1), state=RunnerState.OPENING)])
    last = found.assignments(START_MS + 5_000)
    assert sorted(last) == [1]
    assert last[1].epochs[-1].rate == 500.0
    found.change(START_MS + 6_000, paused=True)
    assert all(a.epochs[-1].rate == 0.0 for a in found.assignments(START_MS + 6_000).values())


def test_what_was_delivered_never_goes_down_and_a_run_is_over_when_all_know_its_end() -> None:
    found = coordinator(ratings=100)
    told = found.assignments(START_MS)
    done = [
        dataclasses.replace(
            ready(p), state=RunnerState.DONE, revision=told[p].revision, next_index=told[p].end_index or 0
        )
        for p in range(2)
    ]
    found.observe(done)
    assert found.totals().finished and found.totals().delivered == 100
    found.observe([dataclasses.replace(ready(0), state=RunnerState.OPENING)])
    assert not found.totals().finished and found.totals().delivered == 100
    found.observe(done)
    found.change(START_MS + 5_000, rate=5.0)
    assert not found.totals().finished  # they do not know of it yet
    assert sum(a.end_index or 0 for a in found.assignments(START_MS + 5_000).values()) == 100


def test_a_shard_that_was_fenced_before_the_plan_was_made_is_waited_for() -> None:
    found = Coordinator(load_settings(partitions=2), "config", [0.5, 0.5])
    found.observe([ready(0), dataclasses.replace(ready(1), state=RunnerState.FENCED)])
    assert not found.ready and found.assignments(START_MS) == {}


# -- placement


@given(st.integers(1, 12), st.data())
def test_at_any_time_a_partition_has_one_actor_at_most_and_in_the_end_one(partitions: int, data: st.DataObject) -> None:
    actors = data.draw(st.integers(1, partitions))
    placement = Placement(partitions, actors)
    having = {n: set(placement.of(n)) for n in range(partitions)}
    now_ms = 0
    for wanted in data.draw(st.lists(st.integers(1, partitions), min_size=1, max_size=3)):
        placement.spread(wanted, now_ms)
        hangs = data.draw(st.sampled_from([None, *range(actors)]))
        while not placement.settled:
            now_ms += 1_000
            for actor in data.draw(st.permutations(range(partitions))):
                if actor == hangs:
                    continue
                having[actor] = set(placement.of(actor))
                placement.heard(actor, having[actor])
                held = [p for n, mine in having.items() if n != hangs for p in mine]
                assert len(held) == len(set(held))
            late = placement.expire(now_ms)
            assert set(late.values()) <= {hangs} and (not late or now_ms >= HAND_OVER_MS)
        actors = wanted
        assert sorted(p for n in range(actors) for p in placement.of(n)) == list(range(partitions))
        having = {n: set(placement.of(n)) for n in range(partitions)}
