"""Whatever the order of send, commit, crash, fence, restart and change: each shard's committed sequence is 0, 1, 2, … once.

Coordinator, runners, shards and plan are the real ones, the broker is :class:`MemoryLog`; each message between them travels on
its own, and may be overtaken by anything.
"""

from __future__ import annotations

import dataclasses
from functools import cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ray_pipeline.clock import FakeClock
from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.delivery.memory import MemoryDelivery, MemoryLog
from ray_pipeline.generator.coordination import Coordinator
from ray_pipeline.generator.plan import ShardSchedule
from ray_pipeline.generator.runner import Assignment, RunnerState, ShardReport, ShardRunner
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.restart import RestartPolicy
from ray_pipeline.truth.replay import ShardReplay, build_models

PARTITIONS = 2
SHARES = [0.7, 0.3]
COMMIT_MS = 100

KEPT = ("ratings alone", "progress alone", "ratings first", "progress first", "nothing first")
HALVES = [f"commit, {kept}" for kept in KEPT]
FAILURES = ["open", "send", "commit", "commit, done", *HALVES]

partitions = st.integers(0, PARTITIONS - 1)
rates = st.sampled_from([0.5, 7.0, 60.0, 300.0])
plans = st.sampled_from(
    [
        "5 + burst(300 for 50ms every 150ms)",
        "ramp(0..200, 2s) then 20",
        "loop(sine(mean=60, amplitude=60, period=1s) for 1300ms)",
    ]
)
spans_s = st.sampled_from([0.001, 0.03, 0.11, 0.4, 2.0])


@cache
def models() -> dict[int, ShardModel]:
    small = load_settings(users=300, movies=100, partitions=PARTITIONS, actors=1)
    return build_models(small, load_catalogue(small), range(PARTITIONS))


@dataclasses.dataclass
class Process:
    """One incarnation of the process that has a shard, with at most one exchange under way."""

    runner: ShardRunner
    orders: list[tuple[Assignment | None, int | None]] = dataclasses.field(default_factory=list)
    answers: list[ShardReport] = dataclasses.field(default_factory=list)


class Generator(RuleBasedStateMachine):
    """A run that anything may happen to."""

    @initialize(
        requested=st.sampled_from([None, 40, 400]),
        start=st.sampled_from(["now", "fixed", "catch up", "catch up at once"]),
        arrivals=st.sampled_from(["regular", "poisson"]),
        plan=st.one_of(st.none(), plans),
        under_way=st.booleans(),
    )
    def begin(self, requested: int | None, start: str, arrivals: str, plan: str | None, under_way: bool) -> None:
        self.clock = FakeClock()
        self.log = MemoryLog()
        self.settings: Settings = load_settings(
            partitions=PARTITIONS,
            actors=1,
            ratings=requested,
            arrivals=arrivals,
            start_time_ms={"now": None, "fixed": 1_500_000_000_000}.get(start, self.clock.now_ms() - 20_000),
            speed={"catch up": 5.0, "catch up at once": "max"}.get(start, 1.0),
            **({"rate": 60.0} if plan is None else {"plan": plan}),
        )
        self.zombies: list[ShardRunner] = []
        self.checked: dict[int, tuple[ShardProgress, int]] = {}
        self.begin_run()
        if under_way:
            self.all_goes_well_for_a_while(0.11)

    def begin_run(self) -> None:
        self.coordinator = Coordinator(self.settings, "config", SHARES, leash_s=2.0)
        self.now = {p: self.new_process(p) for p in range(PARTITIONS)}

    def new_process(self, partition: int) -> Process:
        policy = RestartPolicy(most=10**6)
        runner = ShardRunner(
            partition,
            lambda: models()[partition],
            lambda: MemoryDelivery(self.log, partition),
            COMMIT_MS,
            self.clock,
            policy,
        )
        return Process(runner)

    # -- what happens by itself

    @rule(seconds=spans_s)
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(partition=partitions, steps=st.integers(1, 4))
    def a_shard_works(self, partition: int, steps: int) -> None:
        for _ in range(steps):
            self.now[partition].runner.step()

    @rule(partition=partitions)
    def orders_are_sent(self, partition: int) -> None:
        process = self.now[partition]
        if not process.orders and not process.answers:
            news = self.coordinator.assignments(self.clock.now_ms()).get(partition)
            process.orders.append((news, self.coordinator.leash_ms(self.clock.now_ms())))

    @rule(partition=partitions)
    def orders_arrive(self, partition: int) -> None:
        process = self.now[partition]
        if process.orders:
            process.runner.tell(*process.orders.pop())
            process.answers.append(process.runner.report())

    @rule(partition=partitions)
    def an_answer_arrives(self, partition: int) -> None:
        if self.now[partition].answers:
            self.coordinator.observe([self.now[partition].answers.pop()])

    @rule(partition=partitions, seconds=spans_s)
    def all_goes_well(self, partition: int, seconds: float = 0.0) -> None:
        self.exchange(partition)
        self.clock.advance(seconds)
        self.a_shard_works(partition, 3)
        self.exchange(partition)

    @rule(seconds=spans_s)
    def all_goes_well_for_a_while(self, seconds: float) -> None:
        for _ in range(3):
            for partition in range(PARTITIONS):
                self.all_goes_well(partition, seconds)

    def exchange(self, partition: int) -> None:
        for _ in range(2):
            self.an_answer_arrives(partition)
            self.orders_are_sent(partition)
            self.orders_arrive(partition)
            self.an_answer_arrives(partition)

    # -- what somebody does

    @rule(rate=rates)
    def the_rate_is_changed(self, rate: float) -> None:
        self.coordinator.change(self.clock.now_ms(), rate=rate)

    @rule(plan=plans)
    def the_plan_is_changed(self, plan: str) -> None:
        self.coordinator.change(self.clock.now_ms(), plan=plan)

    @rule(paused=st.booleans())
    def it_is_paused_or_resumed(self, paused: bool) -> None:
        self.coordinator.change(self.clock.now_ms(), paused=paused)

    # -- what goes wrong

    @rule(what=st.sampled_from(FAILURES))
    def something_will_fail(self, what: str) -> None:
        self.log.failures.append(what)

    @rule(
        partition=partitions,
        halves=st.lists(st.sampled_from(HALVES), min_size=1, max_size=3),
        rate=st.one_of(st.none(), rates),
        seconds=spans_s,
        dies=st.booleans(),
    )
    def commits_are_kept_by_halves(
        self, partition: int, halves: list[str], rate: float | None, seconds: float, dies: bool
    ) -> None:
        if rate is not None:
            self.the_rate_is_changed(rate)
        self.exchange(partition)
        self.log.failures[:0] = halves
        for _ in halves:
            self.clock.advance(seconds)
            self.a_shard_works(partition, 2)
        if dies:
            self.a_process_dies(partition)

    @rule(partition=partitions)
    def a_process_dies(self, partition: int) -> None:
        self.now[partition] = self.new_process(partition)

    @rule(partition=partitions)
    def a_process_is_replaced_but_lives_on(self, partition: int) -> None:
        self.zombies.append(self.now[partition].runner)
        self.now[partition] = self.new_process(partition)

    @precondition(lambda self: self.zombies)
    @rule(data=st.data())
    def a_zombie_works(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.zombies)).step()

    @rule(partition=partitions)
    def the_broker_gives_a_transaction_up(self, partition: int) -> None:
        self.log.owner.pop(partition, None)

    @rule(partition=partitions, held=st.booleans())
    def somebody_else_has_a_transaction_open(self, partition: int, held: bool) -> None:
        (self.log.held_up.add if held else self.log.held_up.discard)(partition)

    @rule(rate=rates, plan=st.one_of(st.none(), plans))
    def the_driver_dies_and_the_run_is_started_again(self, rate: float, plan: str | None) -> None:
        self.zombies += [process.runner for process in self.now.values()]
        self.settings = self.settings.model_copy(update={"rate": rate, "plan": plan})
        self.begin_run()

    # -- what is always so

    @invariant()
    def what_is_committed_is_what_is_regenerated(self) -> None:
        for partition, records in self.log.ratings.items():
            progress = self.log.progress.get(partition)
            if self.checked.get(partition) == (progress, len(records)):
                continue
            if progress is None:
                assert not records  # no rating is there before the plan that it was sent by
                continue
            replay = ShardReplay(models()[partition], progress)
            events = replay.events(0, len(records))
            assert records == list(zip(encode_keys(events), encode_values(events), strict=True))
            assert partition in self.log.halves or progress.next_index == len(records)
            assert progress.event_time_ms == (replay.due_ms(progress.next_index - 1) if progress.next_index else None)
            self.checked[partition] = (progress, len(records))

    def teardown(self) -> None:
        """When nothing goes wrong any more, it ends up where it was told to."""
        if not hasattr(self, "log"):
            return
        self.log.failures.clear()
        self.log.held_up.clear()
        # a change, whatever the rate was: a half commit that nobody heard of lasts until the next commit
        for rate in (299.0, 300.0):
            self.coordinator.change(self.clock.now_ms(), rate=rate, paused=False)
        for _ in range(60):
            for partition in range(PARTITIONS):
                self.all_goes_well(partition)
            self.clock.advance(0.15)
        self.what_is_committed_is_what_is_regenerated()
        assert not self.log.halves
        totals = self.coordinator.totals()
        sent = sum(len(records) for records in self.log.ratings.values())
        assert sent == totals.base + totals.delivered
        event_now_ms = self.coordinator.event_now_ms(self.clock.now_ms())
        for progress in self.log.progress.values():
            assert progress.epochs[-1].rate == 300.0
            if self.settings.ratings is None:
                due = ShardSchedule.lived(progress).count_due(event_now_ms - 1_000)
                assert progress.next_index >= due
        if self.settings.ratings is not None:
            assert totals.finished and totals.delivered == self.settings.ratings
        states = {process.runner.report().state for process in self.now.values()}
        assert states <= {RunnerState.RUNNING, RunnerState.DONE}


TestInterleavings = Generator.TestCase
TestInterleavings.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
