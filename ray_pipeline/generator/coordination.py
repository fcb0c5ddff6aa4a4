"""What the shards of a run are told, all together: plan, ends, and what became of them. Pure: no Ray, Kafka or clock."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, replace

from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.errors import ConfigurationError, StateMismatchError
from ray_pipeline.generator.arrivals import poisson_arrivals
from ray_pipeline.generator.event_clock import EventClock
from ray_pipeline.generator.plan import NEVER_MS, RatePlan, ShardSchedule, allocate
from ray_pipeline.generator.runner import Assignment, RunnerState, ShardReport
from ray_pipeline.rates.language import curve_of, goes_by_the_calendar, parse_plan, tidy
from ray_pipeline.rates.shapes import UNIT

__all__ = ["Coordinator", "Totals", "change_lead_ms", "check_same_stream"]

change_lead_ms = 200
"""How far ahead of now a rate change takes effect, so that every shard hears of it before it is past."""

_AT_THE_SEAM_S = 1.0


@dataclass(frozen=True, slots=True)
class Totals:
    """The run so far.

    Attributes:
        delivered: ratings committed in this run.
        base: ratings of earlier runs on the same topic.
        behind_s: how long the most overdue rating has been due, seconds.
        finished: whether every shard has ended in order.
        ended: whether every shard has ended, in order or as failed.
        failed: the first failure that was given up; None when there is none.
        failures: deliveries begun again.
    """

    delivered: int
    base: int
    behind_s: float
    finished: bool
    ended: bool
    failed: str | None
    failures: int


def check_same_stream(settings: Settings, config: str, there: str) -> None:
    """Refuse to go on with a stream of another configuration.

    Args:
        settings: all settings.
        config: digest of the event settings and catalogue.
        there: the digest that a progress record has.

    Raises:
        StateMismatchError: they differ.
    """
    if there != config:
        raise StateMismatchError(
            problem=f"topic {settings.ratings_topic} holds ratings of another configuration ({there}, not {config}): "
            "seed, users, movies or another event setting differs",
            fix="Give the settings of the first run, another topic or state directory, "
            "or clear them with: ray-pipeline reset",
        )


class Coordinator:
    """Keeps the plan that is wanted of every shard and decides what each is told.

    What is wanted is never read back from what shards report: a shard that hears of a change late lives it later, and says so
    in its progress record, but it ends up at the rate that is wanted however often it dies on the way.

    Args:
        settings: all settings.
        config: digest of the event settings and catalogue.
        shares: share of all ratings of each partition.
        leash_s: how far a shard may be ahead of the slowest one while the past is made, seconds of event time; None = however far.

    Raises:
        ConfigurationError: a partition has no users.
    """

    def __init__(self, settings: Settings, config: str, shares: list[float], leash_s: float | None = None) -> None:
        empty = [p for p, share in enumerate(shares) if share <= 0]
        if empty:
            raise ConfigurationError(
                problem=f"no user falls to partition {empty[0]}: users={settings.users} are too few",
                fix="Raise users or lower partitions",
            )
        self.config = config
        self.run = uuid.uuid4().hex[:12]
        self.rate = settings.rate
        self.plan = settings.plan
        self.paused = False
        self.requested: int | None = settings.ratings
        self._settings = settings
        self._shares = shares
        self._revision = 0
        self._wanted: RatePlan | None = None
        self._starts: list[int] = []
        self._ends: list[int | None] = [None] * len(shares)
        self._reports: dict[int, ShardReport] = {}
        self._committed: dict[int, int] = {}
        self._start_ms = 0
        self._seam_ms: int | None = None
        self._plan_zero_ms: int | None = None  # when the plan began; None before
        self._clock = EventClock()
        self._poisson_seed = settings.seed if settings.arrivals == "poisson" else None
        self._backfilling = settings.speed != 1.0
        self._leash_s = leash_s

    @property
    def ready(self) -> bool:
        """Whether every shard has its delivery open."""
        reports = self._reports.values()
        unknown = (RunnerState.OPENING, RunnerState.FENCED)
        return len(reports) == len(self._shares) and all(r.state not in unknown for r in reports)

    @property
    def begun(self) -> bool:
        """Whether a rating is in the topic already; known when :attr:`ready`."""
        return any(report.next_index for report in self._reports.values())

    @property
    def started(self) -> bool:
        """Whether the plan was made."""
        return self._wanted is not None

    @property
    def start_ms(self) -> int:
        """Event time at which this run began, epoch milliseconds; 0 before."""
        return self._start_ms

    def event_now_ms(self, now_ms: int) -> int:
        """Event time that belongs to a wall-clock time."""
        return self._clock.event_ms(now_ms)

    def event_reached_ms(self, now_ms: int) -> int | None:
        """Event time up to which all ratings were sent; None before the start."""
        if self._wanted is None:
            return None
        return self._clock.event_ms(now_ms - round(self.totals().behind_s * 1000))

    def backfilling(self, now_ms: int) -> bool:
        """Whether the stream has still to catch up with the present; once it has, it is live for good."""
        if self._backfilling and self.started and self._clock.event_ms(now_ms) >= now_ms:
            known = [r for r in self._reports.values() if r.revision]
            late = any(r.behind_s > _AT_THE_SEAM_S for r in known)
            self._backfilling = late or len(known) < len(self._shares)
        return self._backfilling

    def leash_ms(self, now_ms: int) -> int | None:
        """Event time that no shard may pass while the past is made, so that all stay in step; None = there is no such time."""
        if self._leash_s is None or not self.started or not self.backfilling(now_ms):
            return None
        waiting = [self._reports[p].waiting_ms for p in range(len(self._shares))]
        slowest_ms = min(self._start_ms if at_ms is None else at_ms for at_ms in waiting)
        return max(self._start_ms, slowest_ms) + round(self._leash_s * 1000)

    def plan_rate(self, now_ms: int) -> float:
        """Rate in force now, ratings per second; 0 = paused or not started."""
        return self._wanted.rate_at(self.event_now_ms(now_ms)) if self._wanted is not None else 0.0

    def target_rate(self, now_ms: int) -> float:
        """Rate that is wanted now, ratings per second, paused or not."""
        if self.plan is None:
            return self.rate
        at_ms = self.event_now_ms(now_ms)
        zero_ms = at_ms if self._plan_zero_ms is None else self._plan_zero_ms
        return curve_of(self.plan, zero_ms).rate_at(at_ms - zero_ms)

    @property
    def epochs(self) -> tuple[Epoch, ...]:
        """The plan that is wanted; empty before the start."""
        return () if self._wanted is None else self._wanted.epochs

    # -- what is heard

    def observe(self, reports: list[ShardReport]) -> None:
        """Note what shards say of themselves, each from the one actor that has it now."""
        for report in reports:
            self._reports[report.partition] = report
            # one that begins again does not know yet how far it came
            self._committed[report.partition] = max(self._committed.get(report.partition, 0), report.next_index)

    def totals(self) -> Totals:
        """The run so far, from what was heard."""
        reports = [self._reports[p] for p in sorted(self._reports)]
        base = sum(self._starts)
        delivered = sum(self._committed.get(p, start) for p, start in enumerate(self._starts)) - base
        over = [
            r.state is RunnerState.STOPPED or (r.state is RunnerState.DONE and r.revision == self._revision)
            for r in reports
        ]
        ended = [in_order or r.state is RunnerState.FAILED for in_order, r in zip(over, reports, strict=True)]
        failed = next((f"shard {r.partition}: {r.error}" for r in reports if r.state is RunnerState.FAILED), None)
        return Totals(
            delivered=max(0, delivered),
            base=base,
            behind_s=max((r.behind_s for r in reports), default=0.0),
            finished=len(over) == len(self._shares) and all(over),
            ended=len(over) == len(self._shares) and all(ended),
            failed=failed,
            failures=sum(r.failures for r in reports),
        )

    # -- what is told

    def assignments(self, now_ms: int) -> dict[int, Assignment]:
        """What to tell the shards that do not know yet what is wanted, by partition; none until all have been ready once.

        A shard is told until its report says that it knows, so a call that is lost loses nothing.

        Raises:
            StateMismatchError: a shard's progress is of another configuration.
        """
        if not self.started:
            if not self.ready:
                return {}
            self._make_plan([self._reports[p].progress for p in range(len(self._shares))], now_ms)
        over = (RunnerState.STOPPED, RunnerState.FAILED)
        return {
            p: self._assignment(p)
            for p, report in self._reports.items()
            if report.revision < self._revision and report.state not in over
        }

    def change(
        self, now_ms: int, *, rate: float | None = None, plan: str | None = None, paused: bool | None = None
    ) -> None:
        """Change the rate or the plan, pause or resume: every shard must be told, see :meth:`assignments`.

        Args:
            now_ms: wall-clock time.
            rate: new rate, ratings per second, > 0, in place of rate or plan; None = as it is.
            plan: text of a new plan, in place of rate or plan; it begins now, or when a pause is over; None = as it is.
            paused: None = as it is. A plan's own time goes on in a pause.

        Raises:
            ConfigurationError: the rate is no finite number above 0.
            PlanError: the plan is malformed.
        """
        if rate is not None and not (math.isfinite(rate) and 0 < rate <= 1e9):
            raise ConfigurationError(
                problem=f"rate {rate!r} is not a number above 0", fix="Give ratings per second, such as 250 or 0.2"
            )
        if plan is not None:
            parse_plan(plan)
            self.plan, self._plan_zero_ms = tidy(plan), None
        elif rate is not None:
            self.rate, self.plan = rate, None
        self.paused = self.paused if paused is None else paused
        if self._wanted is None:
            return
        epoch = self._epoch(self._clock.event_ms(now_ms + change_lead_ms))
        if epoch.same_rates(self._wanted.epochs[-1]):
            return
        self._wanted = self._wanted.with_epoch(epoch)
        self._revision += 1
        self._set_ends()

    # -- history: ratings that somebody else sends in place of the shards, as fast as he can

    def lend(self, now_ms: int, count: int, progress: list[ShardProgress | None]) -> dict[int, Assignment]:
        """Move the stream on by so many ratings. What is not sent of them until :meth:`give_back` is due then.

        On a fixed event clock they follow the last ones, at the target rate. Else they come before now, in time of which no rating
        was sent: before the first one, or in a pause.

        Args:
            now_ms: wall-clock time.
            count: how many ratings, over all shards.
            progress: of each shard, as it is committed, when no shard is being sent.

        Returns:
            What to send, by partition; its end is where history ends.

        Raises:
            ConfigurationError: there was no such time, or the run ends before.
            StateMismatchError: a shard's progress is of another configuration.
        """
        if not self.started:
            self._make_plan(progress, now_ms)
        assert self._wanted is not None
        starts = [p.next_index if p else 0 for p in progress]
        last_ms = max((p.event_time_ms for p in progress if p and p.event_time_ms is not None), default=None)
        before = (self._wanted, self._start_ms, self._plan_zero_ms)
        event_now_ms = self.event_now_ms(now_ms)
        self._wanted = self._plan_of_history(event_now_ms, count, last_ms)
        if last_ms is None:
            self._start_ms = self._wanted.epochs[0].from_ms
        self._set_ends()
        ends = list(allocate(self._schedules(), starts, count))
        try:
            seam_ms = self._seam_of(starts, ends)
        except ConfigurationError:
            self._wanted, self._start_ms, self._plan_zero_ms = before
            self._set_ends()
            raise
        self._seam_ms = max(event_now_ms, seam_ms)  # what was overdue already may be all of it
        if self.paused:
            self._wanted = self._wanted.with_epoch(Epoch(self._seam_ms, 0.0))
        self._revision += 1
        self._set_ends()
        return {p: replace(self._assignment(p), end_index=end) for p, end in enumerate(ends)}

    def give_back(self, now_ms: int) -> None:
        """The shards go on behind history; a fixed event clock goes on there too. Changes nothing where nothing was lent."""
        seam_ms, self._seam_ms = self._seam_ms, None
        if seam_ms is None:
            return
        if self._settings.start_time_ms is not None:
            self._clock = replace(self._clock, start_ms=seam_ms, begin_ms=now_ms)
        self._revision += 1

    def _plan_of_history(self, now_ms: int, count: int, last_ms: int | None) -> RatePlan:
        """The plan with room for so many ratings more; ``now_ms`` is event time."""
        assert self._wanted is not None
        if self._settings.start_time_ms is not None:
            if not self.paused:
                return self._wanted
            return self._wanted.with_epoch(self._epoch(max(now_ms, (last_ms or 0) + 1), paused=False))
        from_ms = now_ms - self._span_ms(count, now_ms)
        if last_ms is not None and from_ms <= last_ms:
            how = f"at {self.rate:g}/s" if self.plan is None else "of the plan"
            raise ConfigurationError(
                problem=f"{count} ratings {how} do not fit between the last rating and now: {self._fit(last_ms, now_ms)} do",
                fix="History comes before the live stream: begin with run --backfill, give --start-time, or pause for longer",
            )
        self._plan_zero_ms = None  # a plan begins with its history
        history = self._epoch(from_ms, paused=False)
        before = self._wanted if last_ms is None else self._wanted.with_epoch(Epoch(last_ms + 1, 0.0))
        return before.with_epoch(history)

    def _seam_of(self, starts: list[int], ends: list[int]) -> int:
        """Event time just behind history.

        Raises:
            ConfigurationError: history goes beyond the end of the run, or of the plan.
        """
        count = sum(ends) - sum(starts)
        if any(limit is not None and end > limit for end, limit in zip(ends, self._ends, strict=True)):
            raise ConfigurationError(
                problem=f"the run ends after {self.requested} ratings: {count} more are too many",
                fix="Give a lower number, or run without --ratings and --duration",
            )
        last = [(s, end - 1) for s, start, end in zip(self._schedules(), starts, ends, strict=True) if end > start]
        seam_ms = 1 + max(int(schedule.due_ms(index, 1)[0]) for schedule, index in last)
        if seam_ms > NEVER_MS:
            raise ConfigurationError(
                problem=f"the plan ends before {count} ratings more are due",
                fix="Give a lower number, or another plan with: ray-pipeline plan",
            )
        return seam_ms

    def _span_ms(self, count: int, now_ms: int) -> int:
        """How long it takes for so many ratings to become due, from the beginning of the rate or the plan.

        Raises:
            ConfigurationError: the plan ends before, or goes by the calendar, so that it has no beginning of its own.
        """
        if self.plan is None:
            return math.ceil(count / self.rate * 1000)
        curve = curve_of(self.plan, now_ms)
        span_ms = curve.span_ms(count)
        if span_ms is None or goes_by_the_calendar(self.plan):
            problem = "ends before" if span_ms is None else "goes by the calendar"
            raise ConfigurationError(
                problem=f"the plan {problem}: {count} ratings of history cannot be made of it",
                fix="Give --start-time, so that history begins there",
            )
        return span_ms

    def _fit(self, last_ms: int, now_ms: int) -> int:
        """How many ratings fit between the last one and now."""
        span_ms = max(0, now_ms - last_ms - 1)
        if self.plan is None:
            return math.floor(span_ms / 1000 * self.rate)
        return curve_of(self.plan, now_ms).upto(span_ms) // UNIT

    # -- inside

    def _phase(self, partition: int) -> float:
        return (partition + 0.5) / len(self._shares)

    def _assignment(self, partition: int) -> Assignment:
        assert self._wanted is not None
        return Assignment(
            self._revision,
            self.run,
            self.config,
            self._wanted.epochs,
            self._shares[partition],
            self._phase(partition),
            self._ends[partition],
            self._clock,
            self._poisson_seed,
        )

    def _epoch(self, from_ms: int, paused: bool | None = None) -> Epoch:
        """What is wanted from an event time on; ``paused``: None = as it is."""
        if self.paused if paused is None else paused:
            return Epoch(from_ms, 0.0)
        if self.plan is None:
            return Epoch(from_ms, self.rate)
        if self._plan_zero_ms is None:
            self._plan_zero_ms = from_ms
        return Epoch(from_ms, 0.0, self.plan, self._plan_zero_ms)

    def _make_plan(self, progress: list[ShardProgress | None], now_ms: int) -> None:
        known = [p for p in progress if p is not None]
        for p in known:
            check_same_stream(self._settings, self.config, p.config)
        if known:
            self.run = known[0].run
        fixed = self._settings.start_time_ms
        sent = [(p.event_time_ms, p.epochs) for p in known if p.event_time_ms is not None]
        if not sent:
            self._start_ms = now_ms if fixed is None else fixed
            self._wanted = RatePlan([self._epoch(self._start_ms)])
        else:
            # the same for all: each shard keeps what it lived itself up to its own last rating
            last_ms, epochs = max(sent, key=lambda of: (of[0], len(of[1])))
            stopped_ms = last_ms + 1
            # with a fixed event clock the stream goes on without a gap; else the time between the runs is a pause
            self._start_ms = stopped_ms if fixed is not None else max(now_ms, stopped_ms)
            self._plan_zero_ms = _began(self.plan, epochs, self._start_ms)
            before = RatePlan(epochs).with_epoch(Epoch(stopped_ms, 0.0))
            self._wanted = before.with_epoch(self._epoch(self._start_ms))
        if fixed is not None:
            self._clock = self._fixed_clock(now_ms)
        self._starts = [p.next_index if p else 0 for p in progress]
        self._check_that_it_lasts()
        self._revision = 1
        self._set_ends()

    def _fixed_clock(self, now_ms: int) -> EventClock:
        speed = self._settings.speed
        if speed != 1.0 and self._start_ms > now_ms:
            ahead_s = (self._start_ms - now_ms) / 1000
            raise ConfigurationError(
                problem=f"speed={speed} has nothing to catch up with: the stream begins {ahead_s:,.0f} s in the future",
                fix="Give an earlier start_time_ms, or drop speed",
            )
        return EventClock(self._start_ms, now_ms, math.inf if speed == "max" else speed)

    def _check_that_it_lasts(self) -> None:
        asked, ever = self._settings.ratings, self._most()
        if asked is not None and ever is not None and ever < asked:
            raise ConfigurationError(
                problem=f"the plan ends after {ever:,} ratings, and ratings={asked} are asked for",
                fix='Have it go on, with "then" and a rate or with loop(…), or ask for fewer',
            )

    def _schedules(self) -> list[ShardSchedule]:
        assert self._wanted is not None
        return [
            ShardSchedule(self._wanted, share, self._phase(p), poisson_arrivals(self._poisson_seed, p))
            for p, share in enumerate(self._shares)
        ]

    def _most(self) -> int | None:
        """How many ratings the plan makes until it is over; None where it has no end."""
        assert self._wanted is not None
        ever = self._wanted.total()
        if self.paused or self.plan is None or math.isinf(ever):
            return None
        ends = [schedule.arrivals.count_upto(ever * schedule.share) for schedule in self._schedules()]
        return sum(max(0, end - start) for end, start in zip(ends, self._starts, strict=True))

    def _set_ends(self) -> None:
        wanted, settings = self._wanted, self._settings
        assert wanted is not None
        schedules = self._schedules()
        if settings.duration_s is not None:
            end_ms = self._start_ms + settings.duration_s * 1000
            if self._poisson_seed is not None:  # as many as come at random in that time
                counts = [schedule.count_due(end_ms) for schedule in schedules]
                self._ends = [max(start, end) for start, end in zip(self._starts, counts, strict=True)]
                self.requested = sum(end or 0 for end in self._ends) - sum(self._starts)
                return
            self.requested = math.floor(wanted.expected(end_ms) - wanted.expected(self._start_ms) + 1e-6)
            most = self._most()  # a rounded one more would never be due
            self.requested = self.requested if most is None else min(self.requested, most)
        if self.requested is None:
            return
        self._ends = list(allocate(schedules, self._starts, self.requested))


def _began(plan: str | None, epochs: tuple[Epoch, ...], start_ms: int) -> int | None:
    """When a plan began that an earlier run followed last; None when it begins with this run: it was another, or is over."""
    last = next((epoch for epoch in reversed(epochs) if epoch.plan is not None or epoch.rate > 0), None)
    if last is None or plan is None or last.plan != plan:
        return None
    return None if curve_of(plan, last.zero_ms).over_at(start_ms - last.zero_ms) else last.zero_ms
