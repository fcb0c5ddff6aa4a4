"""The loop that sends one shard: opens its delivery, sends what is due, commits, and begins again after a failure."""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from ray_pipeline.clock import Clock
from ray_pipeline.delivery.interface import Epoch, ShardDelivery, ShardProgress
from ray_pipeline.errors import DeliveryError, FencedError, RayPipelineError
from ray_pipeline.generator.plan import RatePlan
from ray_pipeline.generator.shard import Shard
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.restart import Decision, RestartPolicy

__all__ = ["Assignment", "RunnerState", "ShardReport", "ShardRunner"]

_log = logging.getLogger(__name__)

MOST_RATINGS_AT_ONCE = 8192
_TICK_S = 0.01  # ratings due within a tick go out together: a produce call each would cost more than it gains
_WORTH_SENDING = 1000
_LONGEST_WAIT_S = 0.25
_OPEN_DEADLINE_S = 60.0


class RunnerState(enum.Enum):
    """Where a runner is in its life."""

    OPENING = "opening"
    READY = "ready"  # delivery is open; waits to be told plan and end
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a runner is to do.

    Attributes:
        run: id of the run.
        config: digest of the event settings and catalogue.
        epochs: the rate plan.
        share: the shard's share of all ratings.
        phase: the shard's phase.
        end_index: where to end (exclusive); None = never.
        clock_offset_ms: event time minus wall clock, milliseconds.
    """

    run: str
    config: str
    epochs: tuple[Epoch, ...]
    share: float
    phase: float
    end_index: int | None
    clock_offset_ms: int


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a runner says of itself.

    Attributes:
        partition: the shard.
        state: where it is in its life.
        next_index: committed so far: index of the next rating.
        progress: last committed progress; None before the first commit of the shard.
        epochs: the plan as lived; empty before the assignment.
        behind_s: how long the next rating has been due, seconds.
        failures: how often delivery failed and was begun again.
        error: the last failure; empty when there was none.
    """

    partition: int
    state: RunnerState
    next_index: int
    progress: ShardProgress | None
    epochs: tuple[Epoch, ...]
    behind_s: float
    failures: int
    error: str


class ShardRunner:
    """Sends one shard on a thread of its own.

    Args:
        model: draws the shard's ratings.
        open_delivery: makes a fresh delivery of this shard.
        commit_interval_ms: time between commits, milliseconds.
        clock: tells the time.
        policy: decides whether to begin again after a failure.
    """

    def __init__(
        self,
        model: ShardModel,
        open_delivery: Callable[[], ShardDelivery],
        commit_interval_ms: int,
        clock: Clock,
        policy: RestartPolicy,
    ) -> None:
        self.partition = model.partition
        self._model = model
        self._open_delivery = open_delivery
        self._commit_interval_ms = commit_interval_ms
        self._clock = clock
        self._policy = policy
        self._lock = threading.Lock()  # guards all below
        self._wake = threading.Event()
        self._stop = False
        self._state = RunnerState.OPENING
        self._assignment: Assignment | None = None
        self._shard: Shard | None = None
        self._committed: ShardProgress | None = None
        self._plan_changed = False
        self._failures = 0
        self._error = ""
        self._thread = threading.Thread(target=self._run, name=f"shard-{self.partition}", daemon=True)

    # -- asked from outside

    def start(self) -> None:
        """Begin to open the delivery."""
        self._thread.start()

    def begin(self, assignment: Assignment) -> None:
        """Tell plan and end; a runner that was told already keeps what it has."""
        with self._lock:
            if self._assignment is None:
                self._assignment = assignment
                self._wake.set()

    def change_rate(self, epoch: Epoch) -> None:
        """Go on with another rate. A runner that was told nothing yet ignores it: its assignment will have the epoch."""
        with self._lock:
            if self._shard is not None:
                self._shard.change_rate(epoch)
                self._plan_changed = True
                self._wake.set()
            elif self._assignment is not None:
                plan = RatePlan(self._assignment.epochs).with_epoch(epoch)
                self._assignment = replace(self._assignment, epochs=plan.epochs)

    def end_at(self, end_index: int | None) -> None:
        """Move the end; an end below what was taken already ends at once."""
        with self._lock:
            if self._shard is not None:
                self._shard.end_index = end_index
                self._wake.set()
            elif self._assignment is not None:
                self._assignment = replace(self._assignment, end_index=end_index)

    def stop(self) -> None:
        """Commit what was sent and end; does not wait."""
        with self._lock:
            self._stop = True
            self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; False when the time ran out."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def report(self) -> ShardReport:
        """How it stands."""
        with self._lock:
            shard, assignment = self._shard, self._assignment
            behind_ms = 0
            if shard is not None and assignment is not None and self._state is RunnerState.RUNNING:
                behind_ms = shard.behind_ms(self._clock.now_ms() + assignment.clock_offset_ms)
            return ShardReport(
                self.partition,
                self._state,
                self._committed.next_index if self._committed else 0,
                self._committed,
                shard.plan.epochs if shard else (),
                behind_ms / 1000.0,
                self._failures,
                self._error,
            )

    # -- the thread

    def _run(self) -> None:
        while True:
            try:
                self._session()
                return
            except FencedError as error:
                # another incarnation of this shard took over: to go on would only fence that one in turn
                self._fail(error, RunnerState.STOPPED)
                return
            except DeliveryError as error:
                if self._policy.failed(self._clock.now_ms()) is Decision.GIVE_UP:
                    self._fail(error, RunnerState.FAILED)
                    return
                with self._lock:
                    self._failures += 1
                    self._error = str(error)
                    if self._stop:
                        self._state = RunnerState.FAILED
                        return
                    wait_s = self._policy.backoff_s
                _log.warning("shard %d: %s; beginning again in %.1f s", self.partition, error, wait_s)
                self._clock.wait(threading.Event(), wait_s)
            except Exception as error:  # noqa: BLE001 - the thread's last line: reported, and shown as failed
                _log.exception("shard %d failed", self.partition)
                self._fail(error, RunnerState.FAILED)
                return

    def _fail(self, error: Exception, state: RunnerState) -> None:
        text = str(error) if isinstance(error, RayPipelineError) else f"{type(error).__name__}: {error}"
        with self._lock:
            self._state = state
            self._error = text

    def _session(self) -> None:
        delivery = self._open_delivery()
        try:
            progress = delivery.open(_OPEN_DEADLINE_S)
            shard, assignment = self._opened(progress)
            if shard is not None and assignment is not None:
                self._send_until_done(delivery, shard, assignment)
        finally:
            delivery.close()

    def _opened(self, progress: ShardProgress | None) -> tuple[Shard | None, Assignment | None]:
        """Wait to be told what to do; (None, None) when told to stop instead."""
        next_index = progress.next_index if progress else 0
        event_ms = progress.event_time_ms if progress else None
        with self._lock:
            self._committed = progress
            self._state = RunnerState.READY
        while True:
            with self._lock:
                self._wake.clear()
                if self._stop:
                    self._state = RunnerState.STOPPED
                    return None, None
                assignment = self._assignment
                if assignment is not None:
                    if self._shard is None:
                        self._shard = Shard(
                            self._model,
                            assignment.share,
                            assignment.phase,
                            RatePlan(assignment.epochs),
                            next_index,
                            assignment.end_index,
                        )
                    self._shard.rewind(next_index, event_ms)
                    self._plan_changed = True  # the plan is on record from the first commit on
                    self._state = RunnerState.RUNNING
                    return self._shard, assignment
            self._clock.wait(self._wake, _LONGEST_WAIT_S)

    def _send_until_done(self, delivery: ShardDelivery, shard: Shard, assignment: Assignment) -> None:
        uncommitted = 0
        last_commit_ms = self._clock.now_ms()
        while True:
            now_ms = self._clock.now_ms()
            with self._lock:
                self._wake.clear()
                stopping = self._stop
                due = 0 if stopping else shard.due_now(now_ms + assignment.clock_offset_ms)
                batch = shard.take(min(due, MOST_RATINGS_AT_ONCE)) if due else None
                changed, ending = self._plan_changed, stopping or shard.done
                if not uncommitted and not batch:
                    last_commit_ms = now_ms
            if batch is not None:
                delivery.send(batch)
                uncommitted += len(batch)
            late_enough = now_ms - last_commit_ms >= self._commit_interval_ms
            if changed or ((uncommitted or ending) and (ending or late_enough)):
                self._commit(delivery, shard, assignment)
                uncommitted = 0
                last_commit_ms = now_ms
            if ending and self._ended(shard):
                return
            if due <= MOST_RATINGS_AT_ONCE:
                self._wait(shard, assignment, last_commit_ms if uncommitted else None)

    def _wait(self, shard: Shard, assignment: Assignment, last_commit_ms: int | None) -> None:
        """Sleep until there is something worth doing.

        With ratings waiting for their commit: until the commit, which is when they are seen, or until so many more are due
        that sending them should not wait for it.
        """
        now_ms = self._clock.now_ms()
        ahead = 0 if last_commit_ms is None else _WORTH_SENDING
        with self._lock:
            next_ms = shard.next_due_ms(ahead) - assignment.clock_offset_ms - now_ms
        wait_s = max(_TICK_S, min(next_ms / 1000.0, _LONGEST_WAIT_S))
        if last_commit_ms is not None:
            wait_s = min(wait_s, max(0.001, (last_commit_ms + self._commit_interval_ms - now_ms) / 1000.0))
        self._clock.wait(self._wake, wait_s)

    def _commit(self, delivery: ShardDelivery, shard: Shard, assignment: Assignment) -> None:
        with self._lock:
            progress = ShardProgress(
                run=assignment.run,
                config=assignment.config,
                partition=self.partition,
                next_index=shard.next_index,
                event_time_ms=shard.last_event_ms,
                committed_ms=self._clock.now_ms(),
                epochs=shard.plan.epochs,
                share=assignment.share,
                phase=assignment.phase,
            )
            self._plan_changed = False
        delivery.commit(progress)
        with self._lock:
            self._committed = progress
            self._error = ""

    def _ended(self, shard: Shard) -> bool:
        """Whether to end for good; decided under the lock, because the end may have been moved meanwhile."""
        with self._lock:
            if not (self._stop or shard.done):
                return False
            self._state = RunnerState.DONE if shard.done else RunnerState.STOPPED
            return True
