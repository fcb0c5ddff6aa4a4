"""Plans on shards: epochs of shapes, pauses, changes, restarts, catching up, and what is proved of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.config import load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.errors import ConfigurationError, PlanError
from ray_pipeline.generator.arrivals import poisson_arrivals
from ray_pipeline.generator.coordination import Coordinator, change_lead_ms
from ray_pipeline.generator.event_clock import EventClock
from ray_pipeline.generator.plan import NEVER_MS, RatePlan, ShardSchedule
from ray_pipeline.generator.runner import RunnerState, ShardReport
from ray_pipeline.metrics.expected import surplus

START_MS = 1_700_000_000_000
DAY_CURVE = "sine(mean=300, amplitude=200, period=24h)"
texts = st.sampled_from(
    [
        "ramp(0..500, 10s) then 20",
        "50 + burst(1000 for 50ms every 300ms)",
        "loop(100 for 200ms then 0 for 900ms)",
        "30 for 4s",
        "spike(peak=900, rise=1s, hold=500ms, fall=2s) + 0.5",
        'cron("* * * * *", length=20s, rate=80)',
    ]
)


def epochs_of(changes: list[tuple[int, float | str]]) -> list[Epoch]:
    at, found = START_MS, []
    for length, law in changes:
        found.append(Epoch(at, law) if isinstance(law, float) else Epoch(at, 0.0, law, at - length // 2))
        at += length
    return found


# in between lie centuries, of which the windows of a cron expression are counted one by one: minutes of a test
rates = st.one_of(st.sampled_from([0.0, 5e-324, 1e-300]), st.floats(0.01, 300))
changes = st.lists(st.tuples(st.integers(1, 8_000), st.one_of(texts, rates)), min_size=1, max_size=5)
shares = st.floats(0.05, 1.0)
seeds = st.one_of(st.none(), st.just(42))


def schedule(epochs: list[Epoch], share: float, seed: int | None) -> ShardSchedule:
    return ShardSchedule.lived(ShardProgress("r", "c", 1, 0, None, 0, tuple(epochs), share, 0.5, seed))


@settings(max_examples=100, deadline=None)
@given(changes, shares, seeds, st.integers(0, 1_500), st.data())
def test_times_follow_any_epochs_however_they_are_cut(
    steps: list[tuple[int, float | str]], share: float, seed: int | None, count: int, data: st.DataObject
) -> None:
    found = schedule(epochs_of(steps), share, seed)
    times = found.due_ms(0, count)
    assert (np.diff(times) >= 0).all()
    at = data.draw(st.integers(0, count))
    assert (np.concatenate([found.due_ms(0, at), found.due_ms(at, count - at)]) == times).all()
    assert (times[times < NEVER_MS] >= START_MS).all()
    reached = int(np.count_nonzero(times < NEVER_MS))
    ends = [START_MS + offset for offset in (0, 777, 5_000, 20_000)]
    for end_ms in ends:
        due = found.count_due(end_ms)
        if due < count and reached == count:
            assert abs(int(np.count_nonzero(times <= end_ms)) - due) <= 1 + np.count_nonzero(times == end_ms)
    before = found.count_before(np.array(ends, np.int64), count)
    assert before.tolist() == [int(np.count_nonzero(times < end_ms)) for end_ms in ends]


@settings(max_examples=100, deadline=None)
@given(changes, changes, shares, seeds, st.integers(0, 1_500))
def test_no_rating_that_was_taken_changes_its_time(
    lived: list[tuple[int, float | str]],
    wanted: list[tuple[int, float | str]],
    share: float,
    seed: int | None,
    taken: int,
) -> None:
    before = schedule(epochs_of(lived), share, seed)
    times = before.due_ms(0, taken)
    taken = int(np.count_nonzero(times < NEVER_MS))
    plan = RatePlan(epochs_of(wanted))
    after = before.going_on(plan, taken)
    assert (after.due_ms(0, taken) == times[:taken]).all()
    assert (np.diff(after.due_ms(0, taken + 50)) >= 0).all()
    assert after.plan.epochs[-1].same_rates(plan.epochs[-1])
    assert after.going_on(plan, taken).plan.epochs == after.plan.epochs


def test_a_progress_record_of_constant_rates_is_as_it_ever_was_and_one_of_plans_can_be_read_back() -> None:
    constant = ShardProgress("r", "c", 0, 1, START_MS, START_MS, (Epoch(START_MS, 12.5),), 0.25, 0.125)
    assert constant.to_json() == (
        b'{"run":"r","config":"c","partition":0,"next_index":1,"event_time_ms":1700000000000,"committed_ms":1700000000000,'
        b'"epochs":[{"from_ms":1700000000000,"rate":12.5}],"share":0.25,"phase":0.125}'
    )
    planned = dataclasses.replace(
        constant, epochs=(*constant.epochs, Epoch(START_MS + 5, 0.0, DAY_CURVE, START_MS)), poisson_seed=42
    )
    assert ShardProgress.from_json(planned.to_json()) == planned
    assert json.loads(planned.to_json())["epochs"][1] == {
        "from_ms": START_MS + 5,
        "plan": DAY_CURVE,
        "zero_ms": START_MS,
    }


@given(texts, seeds, st.integers(20, 1_000), st.integers(0, 50), st.integers(-5, 5))
def test_too_many_and_too_few_are_seen_under_every_shape(
    text: str, seed: int | None, read: int, ahead: int, difference: int
) -> None:
    epochs = (Epoch(START_MS, 0.0, f"({text}) + 1", START_MS),)
    times = schedule(list(epochs), 0.5, seed).due_ms(0, read + ahead)
    progress = ShardProgress("r", "c", 1, read + ahead, int(times[-1]), START_MS, epochs, 0.5, 0.5, seed)
    found = surplus(json.loads(progress.to_json()), read + difference, int(times[read - 1]))
    together = int(np.count_nonzero(times == times[read - 1]))
    assert found is not None and abs(found - difference) <= together
    assert difference or found == 0


def test_a_record_with_a_malformed_plan_is_a_malformed_record() -> None:
    record = {"event_time_ms": START_MS, "epochs": [{"from_ms": 0, "plan": "5 then", "zero_ms": 0}]}
    with pytest.raises(ValueError, match="character 3"):  # what those who read records pass over
        surplus(record, 5, START_MS)


# -- what the coordinator wants


def report(partition: int, progress: ShardProgress | None = None, **changes: object) -> ShardReport:
    next_index = progress.next_index if progress else 0
    plain = ShardReport(partition, RunnerState.READY, 0, next_index, progress, 0.0, 0, "")
    return dataclasses.replace(plain, **changes)


def started(now_ms: int = START_MS, progress: ShardProgress | None = None, **changes: object) -> Coordinator:
    found = Coordinator(load_settings(partitions=2, actors=1, **changes), "config", [0.5, 0.5])
    found.observe([report(0, progress), report(1)])
    found.assignments(now_ms)
    return found


def test_a_plan_begins_with_the_run_and_a_pause_does_not_move_it() -> None:
    found = started(plan=DAY_CURVE)
    assert found.epochs == (Epoch(START_MS, 0.0, DAY_CURVE, START_MS),)
    found.change(START_MS + 10_000, paused=True)
    found.change(START_MS + 20_000, paused=False)
    assert found.epochs[1:] == (
        Epoch(START_MS + 10_000 + change_lead_ms, 0.0),
        Epoch(START_MS + 20_000 + change_lead_ms, 0.0, DAY_CURVE, START_MS),
    )
    six_hours = START_MS + 6 * 3_600_000
    assert found.plan_rate(six_hours) == pytest.approx(500, rel=1e-3) == found.target_rate(six_hours)


def test_a_plan_that_is_set_begins_then_also_when_it_is_the_same_and_one_set_in_a_pause_begins_after_it() -> None:
    found = started(rate=100)
    for second in (1, 2):
        found.change(START_MS + second * 1_000, plan="  ramp(0..500, 10m)   then 500")
        at_ms = START_MS + second * 1_000 + change_lead_ms
        assert found.epochs[-1] == Epoch(at_ms, 0.0, "ramp(0..500, 10m) then 500", at_ms)
    found.change(START_MS + 3_000, paused=True)
    found.change(START_MS + 4_000, plan="7 for 1m")
    assert found.epochs[-1] == Epoch(START_MS + 3_000 + change_lead_ms, 0.0)
    found.change(START_MS + 9_000, paused=False)
    assert found.epochs[-1].zero_ms == found.epochs[-1].from_ms == START_MS + 9_000 + change_lead_ms
    found.change(START_MS + 12_000, rate=3.0)
    assert found.epochs[-1] == Epoch(START_MS + 12_000 + change_lead_ms, 3.0) and found.plan is None
    epochs = found.epochs
    with pytest.raises(PlanError, match="character 5"):
        found.change(START_MS + 13_000, plan="500 then 3")
    assert found.epochs == epochs and found.plan is None


def test_the_next_run_goes_on_with_the_same_plan_where_its_time_is_and_begins_another_one() -> None:
    lived = (Epoch(START_MS, 0.0, DAY_CURVE, START_MS), Epoch(START_MS + 5_000, 0.0))
    last_ms = int(schedule(list(lived), 0.5, None).due_ms(100, 1)[0])
    progress = ShardProgress("r", "config", 0, 101, last_ms, START_MS, lived[:1], 0.5, 0.25)
    again_ms = START_MS + 3_600_000
    assert started(again_ms, progress, plan=DAY_CURVE).epochs[-1] == Epoch(again_ms, 0.0, DAY_CURVE, START_MS)
    over = (Epoch(START_MS, 0.0, "30 for 50m", START_MS),)
    done = dataclasses.replace(
        progress, epochs=over, event_time_ms=int(schedule(list(over), 0.5, None).due_ms(100, 1)[0])
    )
    assert started(again_ms - 660_000, done, plan="30 for 50m").epochs[-1].zero_ms == START_MS
    assert started(again_ms, done, plan="30 for 50m").epochs[-1].zero_ms == again_ms  # it was over: begins anew
    assert started(again_ms, progress, plan="5 for 1h").epochs[-1] == Epoch(again_ms, 0.0, "5 for 1h", again_ms)


def test_bounds_hold_under_a_plan_with_random_arrivals_too() -> None:
    text = "loop(100 for 1s then 0 for 1s)"
    assert started(plan=text, duration_s=10).requested == 500
    found = started(plan=text, duration_s=1_000, arrivals="poisson", seed=5)
    assert found.requested != 50_000 and abs((found.requested or 0) - 50_000) < 5 * 224
    told = started(plan=text, ratings=777, arrivals="poisson").assignments(START_MS)
    assert sum(a.end_index or 0 for a in told.values()) == 777 and {a.poisson_seed for a in told.values()} == {42}
    with pytest.raises(ConfigurationError, match="the plan ends after 600 ratings, and ratings=1000"):
        started(plan="10 for 1m", ratings=1_000)


@pytest.mark.parametrize("partitions", [1, 3, 7])
@pytest.mark.parametrize("arrivals", ["regular", "poisson"])
@pytest.mark.parametrize("text", ["10 for 1m", "burst(7 for 1s every 2s) for 33s", "spike(peak=9, rise=3s, fall=5s)"])
def test_no_rating_is_waited_for_that_a_plan_never_makes(text: str, arrivals: str, partitions: int) -> None:
    shares = [1 / partitions] * partitions
    bounded = load_settings(partitions=partitions, actors=1, plan=text, arrivals=arrivals, duration_s=3_600)
    found = Coordinator(bounded, "config", shares)
    found.observe([report(p) for p in range(partitions)])
    told = found.assignments(START_MS)
    assert found.requested == pytest.approx(RatePlan(found.epochs).total(), abs=partitions + 100)
    for p, orders in told.items():
        assert orders.end_index is not None
        poisson = poisson_arrivals(orders.poisson_seed, p)
        lived = ShardSchedule(RatePlan(orders.epochs), orders.share, orders.phase, poisson)
        assert orders.end_index == 0 or lived.due_ms(orders.end_index - 1, 1)[0] < NEVER_MS


# -- the event clock


def test_the_clock_goes_faster_until_the_seam_and_then_with_the_wall_clock_without_a_jump() -> None:
    clock = EventClock(START_MS - 90_000, START_MS, 10.0)
    assert [clock.event_ms(START_MS + s * 1000) - START_MS for s in (0, 5, 10, 11, 3_600)] == [
        *(-90_000, -40_000, 10_000, 11_000, 3_600_000),
    ]
    assert EventClock(START_MS - 90_000, START_MS, float("inf")).event_ms(START_MS + 1) == START_MS + 1
    assert EventClock(0, START_MS).event_ms(START_MS + 5_000) == 5_000  # at speed 1 it keeps its distance


@given(st.integers(0, 10**7), st.sampled_from([1.0, 1.5, 10.0, 999.0, float("inf")]), st.integers(-(10**6), 10**8))
def test_an_event_time_is_reached_when_the_clock_says_so(behind_ms: int, speed: float, at_ms: int) -> None:
    clock = EventClock(START_MS - behind_ms, START_MS, speed)
    event_ms = clock.event_ms(START_MS + at_ms)
    wall_ms = clock.wall_ms(event_ms)
    assert clock.event_ms(wall_ms) >= event_ms and (wall_ms == 0 or clock.event_ms(wall_ms - 1) < event_ms)


def test_it_is_backfilling_until_every_shard_has_reached_the_present_and_live_for_good_then() -> None:
    found = started(start_time_ms=START_MS - 90_000, speed=10)
    running = [report(p, state=RunnerState.RUNNING, revision=1) for p in range(2)]
    found.observe(running)
    assert found.backfilling(START_MS + 5_000)
    assert found.event_reached_ms(START_MS + 5_000) == START_MS - 40_000
    found.observe([running[0], dataclasses.replace(running[1], behind_s=3.0)])
    assert found.backfilling(START_MS + 11_000)
    found.observe(running)
    assert not found.backfilling(START_MS + 12_000)
    found.observe([running[0], dataclasses.replace(running[1], behind_s=30.0)])
    assert not found.backfilling(START_MS + 50_000)
    assert not started(start_time_ms=1).backfilling(START_MS)
    with pytest.raises(ConfigurationError, match="5 s in the future"):
        started(start_time_ms=START_MS + 5_000, speed="max")


def test_no_shard_gets_far_ahead_of_the_slowest_while_the_past_is_made() -> None:
    past = load_settings(partitions=2, actors=1, start_time_ms=START_MS - 10**8, speed="max")
    found = Coordinator(past, "config", [0.5, 0.5], leash_s=30.0)
    found.observe([report(0), report(1)])
    assert found.leash_ms(START_MS) is None  # nothing is told yet
    found.assignments(START_MS)
    begin_ms = START_MS - 10**8
    assert found.leash_ms(START_MS) == begin_ms + 30_000
    running = [report(p, state=RunnerState.RUNNING, revision=1, behind_s=1e5) for p in range(2)]
    ahead, slow = (
        dataclasses.replace(r, waiting_ms=begin_ms + at) for r, at in zip(running, (90_000, 7_000), strict=True)
    )
    found.observe([ahead, slow])
    assert found.leash_ms(START_MS) == begin_ms + 37_000
    found.observe([dataclasses.replace(r, waiting_ms=NEVER_MS, behind_s=0.0) for r in running])
    assert found.leash_ms(START_MS) is None  # live
    live = Coordinator(load_settings(partitions=1, actors=1), "config", [1.0], leash_s=30.0)
    live.observe([report(0)])
    live.assignments(START_MS)
    assert live.leash_ms(START_MS) is None


# -- history


@pytest.mark.parametrize("arrivals", ["regular", "poisson"])
def test_history_before_a_live_plan_is_the_plans_beginning(arrivals: str) -> None:
    text = "ramp(0..200, 1m) then 200 + burst(300 for 1s every 10s)"
    bounded = load_settings(partitions=2, actors=1, plan=text, arrivals=arrivals)
    found = Coordinator(bounded, "config", [0.5, 0.5])
    found.observe([report(0), report(1)])
    lent = found.lend(START_MS, 20_000, [None, None])
    assert sum(a.end_index or 0 for a in lent.values()) == 20_000 and {a.poisson_seed for a in lent.values()} == {
        42 if arrivals == "poisson" else None
    }
    epoch = found.epochs[-1]
    assert epoch.plan == text and epoch.zero_ms == epoch.from_ms < START_MS
    last = [
        int(
            ShardSchedule(RatePlan(a.epochs), a.share, a.phase, poisson_arrivals(a.poisson_seed, p)).due_ms(end - 1, 1)[
                0
            ]
        )
        for p, a in lent.items()
        if (end := a.end_index)
    ]
    assert max(last) == pytest.approx(START_MS, abs=5_000)
    found.give_back(START_MS + 10_000)
    assert found.epochs == (epoch,) and found.plan_rate(START_MS + 60_000) in (200.0, 500.0)


def test_history_of_a_plan_that_makes_too_few_or_goes_by_the_calendar_is_refused_and_changes_nothing() -> None:
    for text, why in (("10 for 1m", "ends before"), ('cron("* * * * *", length=30s, rate=9)', "goes by the calendar")):
        found = started(plan=text)
        epochs = found.epochs
        with pytest.raises(ConfigurationError, match=why):
            found.lend(START_MS, 20_000, [None, None])
        assert found.epochs == epochs


def test_history_on_a_fixed_clock_moves_the_clock_on_behind_it_at_any_speed() -> None:
    for speed in (1, "max"):
        found = started(start_time_ms=START_MS - 10**7, speed=speed, rate=100)
        found.lend(START_MS, 500_000, [None, None])
        found.give_back(START_MS + 1_000)
        seam_ms = found.event_now_ms(START_MS + 1_000)
        assert seam_ms == pytest.approx(START_MS + 1_000 if speed == "max" else START_MS - 5_000_000, abs=100)
