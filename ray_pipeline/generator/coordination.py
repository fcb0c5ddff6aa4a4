"""What the shards of a run are told, all together: plan, ends, and what became of them. Pure: no Ray, Kafka or clock."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, replace

from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.errors import ConfigurationError, StateMismatchError
from ray_pipeline.generator.plan import RatePlan, ShardSchedule, allocate
from ray_pipeline.generator.runner import Assignment, RunnerState, ShardReport

__all__ = ["Coordinator", "Totals", "change_lead_ms", "check_same_stream"]

change_lead_ms = 200
"""How far ahead of now a rate change takes effect, so that every shard hears of it before it is past."""


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

    Raises:
        ConfigurationError: a partition has no users.
    """

    def __init__(self, settings: Settings, config: str, shares: list[float]) -> None:
        empty = [p for p, share in enumerate(shares) if share <= 0]
        if empty:
            raise ConfigurationError(
                problem=f"no user falls to partition {empty[0]}: users={settings.users} are too few",
                fix="Raise users or lower partitions",
            )
        self.config = config
        self.run = uuid.uuid4().hex[:12]
        self.rate = settings.rate
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
        self._offset_ms = 0
        self._seam_ms: int | None = None

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

    @property
    def clock_offset_ms(self) -> int:
        """Event time minus wall clock, milliseconds; 0 unless the event clock was fixed."""
        return self._offset_ms

    def event_now_ms(self, now_ms: int) -> int:
        """Event time that belongs to a wall-clock time."""
        return now_ms + self._offset_ms

    def plan_rate(self, now_ms: int) -> float:
        """Rate in force now, ratings per second; 0 = paused or not started."""
        return self._wanted.rate_at(self.event_now_ms(now_ms)) if self._wanted is not None else 0.0

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

    def change(self, now_ms: int, *, rate: float | None = None, paused: bool | None = None) -> None:
        """Change the rate, pause or resume: every shard must be told, see :meth:`assignments`.

        Args:
            now_ms: wall-clock time.
            rate: new rate, ratings per second, > 0; None = as it is.
            paused: None = as it is.

        Raises:
            ConfigurationError: the rate is no finite number above 0.
        """
        if rate is not None and not (math.isfinite(rate) and 0 < rate <= 1e9):
            raise ConfigurationError(
                problem=f"rate {rate!r} is not a number above 0", fix="Give ratings per second, such as 250 or 0.2"
            )
        before = 0.0 if self.paused else self.rate
        self.rate = self.rate if rate is None else rate
        self.paused = self.paused if paused is None else paused
        after = 0.0 if self.paused else self.rate
        if after == before or self._wanted is None:
            return
        epoch = Epoch(self.event_now_ms(now_ms) + change_lead_ms, after)
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
        before = (self._wanted, self._start_ms)
        event_now_ms = self.event_now_ms(now_ms)
        self._wanted = self._plan_of_history(event_now_ms, count, last_ms)
        schedules = [ShardSchedule(self._wanted, share, self._phase(p)) for p, share in enumerate(self._shares)]
        ends = list(allocate(schedules, starts, count))
        if last_ms is None:
            self._start_ms = self._wanted.epochs[0].from_ms
        self._set_ends()
        if any(limit is not None and end > limit for end, limit in zip(ends, self._ends, strict=True)):
            self._wanted, self._start_ms = before
            self._set_ends()
            raise ConfigurationError(
                problem=f"the run ends after {self.requested} ratings: {count} more are too many",
                fix="Give a lower number, or run without --ratings and --duration",
            )
        times = [
            int(s.due_ms(end - 1, 1)[0]) for s, end, start in zip(schedules, ends, starts, strict=True) if end > start
        ]
        self._seam_ms = max(event_now_ms, 1 + max(times))  # what was overdue already may be all of it
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
            self._offset_ms = seam_ms - now_ms
        self._revision += 1

    def _plan_of_history(self, now_ms: int, count: int, last_ms: int | None) -> RatePlan:
        """The plan with room for so many ratings more; ``now_ms`` is event time."""
        assert self._wanted is not None
        if self._settings.start_time_ms is not None:
            if not self.paused:
                return self._wanted
            return self._wanted.with_epoch(Epoch(max(now_ms, (last_ms or 0) + 1), self.rate))
        from_ms = now_ms - math.ceil(count / self.rate * 1000)
        if last_ms is None:
            return self._wanted.with_epoch(Epoch(from_ms, self.rate))
        if from_ms <= last_ms:
            fit = max(0, math.floor((now_ms - last_ms - 1) / 1000 * self.rate))
            raise ConfigurationError(
                problem=f"{count} ratings at {self.rate:g}/s do not fit between the last rating and now: {fit} do",
                fix="History comes before the live stream: begin with run --backfill, give --start-time, or pause for longer",
            )
        return self._wanted.with_epoch(Epoch(last_ms + 1, 0.0)).with_epoch(Epoch(from_ms, self.rate))

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
            self._offset_ms,
        )

    def _make_plan(self, progress: list[ShardProgress | None], now_ms: int) -> None:
        known = [p for p in progress if p is not None]
        for p in known:
            check_same_stream(self._settings, self.config, p.config)
        if known:
            self.run = known[0].run
        rate = 0.0 if self.paused else self.rate
        fixed = self._settings.start_time_ms
        sent = [(p.event_time_ms, p.epochs) for p in known if p.event_time_ms is not None]
        if not sent:
            self._start_ms = now_ms if fixed is None else fixed
            self._wanted = RatePlan([Epoch(self._start_ms, rate)])
        else:
            # the same for all: each shard keeps what it lived itself up to its own last rating
            last_ms, epochs = max(sent, key=lambda of: (of[0], len(of[1])))
            stopped_ms = last_ms + 1
            # with a fixed event clock the stream goes on without a gap; else the time between the runs is a pause
            self._start_ms = stopped_ms if fixed is not None else max(now_ms, stopped_ms)
            before = RatePlan(epochs).with_epoch(Epoch(stopped_ms, 0.0))
            self._wanted = before.with_epoch(Epoch(self._start_ms, rate))
        self._offset_ms = 0 if fixed is None else self._start_ms - now_ms
        self._starts = [p.next_index if p else 0 for p in progress]
        self._revision = 1
        self._set_ends()

    def _set_ends(self) -> None:
        wanted, settings = self._wanted, self._settings
        assert wanted is not None
        if settings.duration_s is not None:
            end_ms = self._start_ms + settings.duration_s * 1000
            self.requested = math.floor(wanted.expected(end_ms) - wanted.expected(self._start_ms) + 1e-6)
        if self.requested is None:
            return
        schedules = [ShardSchedule(wanted, share, self._phase(p)) for p, share in enumerate(self._shares)]
        self._ends = list(allocate(schedules, self._starts, self.requested))
