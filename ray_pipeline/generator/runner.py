"""The life of one shard: opens its delivery, sends what is due, commits, and begins again after a failure."""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ray_pipeline.clock import Clock
from ray_pipeline.delivery.interface import Epoch, ShardDelivery, ShardProgress
from ray_pipeline.errors import BrokerUnavailableError, DeliveryError, FencedError, NotAllowedError, RayPipelineError
from ray_pipeline.generator.event_clock import EventClock
from ray_pipeline.generator.plan import RatePlan
from ray_pipeline.generator.sequence import LOOK_AT
from ray_pipeline.generator.shard import Shard
from ray_pipeline.generator.standing import Standing, check_that_none_was_sent
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.restart import Decision, RestartPolicy

__all__ = ["Assignment", "RunnerState", "ShardReport", "ShardRunner"]

_log = logging.getLogger(__name__)

MOST_RATINGS_AT_ONCE = 1 << 15
_TICK_S = 0.01  # ratings due within a tick go out together: a produce call each would cost more than it gains
_WORTH_SENDING = 1000
_LONGEST_WAIT_S = 0.25
_OPEN_DEADLINE_S = 60.0
_CONFIRM_DEADLINE_S = 30.0
_LOOK_FURTHER = 25_000  # newest records of a partition, when the very newest say that there are too few
_LOOK_AT_FIRST = 1_000  # oldest records of a partition, when there is no progress record


class RunnerState(enum.Enum):
    """Where a runner is in its life."""

    OPENING = "opening"
    READY = "ready"  # delivery is open; waits to be told plan and end
    RUNNING = "running"
    DONE = "done"  # all is committed up to the end; goes on when the end is moved
    FENCED = "fenced"  # somebody else opened the shard, or the broker gave it up; waits to be told to begin again
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a runner is to do.

    Attributes:
        revision: counts the changes of what is wanted, from 1.
        run: id of the run.
        config: digest of the event settings and catalogue.
        epochs: the rate plan that is wanted.
        share: the shard's share of all ratings.
        phase: the shard's phase.
        end_index: where to end (exclusive); None = never.
        clock: which event time is due when.
        poisson_seed: seed of random arrivals; None = regular ones.
    """

    revision: int
    run: str
    config: str
    epochs: tuple[Epoch, ...]
    share: float
    phase: float
    end_index: int | None
    clock: EventClock
    poisson_seed: int | None = None


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a runner says of itself.

    Attributes:
        partition: the shard.
        state: where it is in its life.
        revision: of the assignment that it follows; 0 before the first.
        next_index: committed so far: index of the next rating.
        progress: last committed progress; None before the first commit of the shard.
        behind_s: how long the next rating has been due, seconds.
        waiting_ms: event time of the first rating that is not committed, epoch milliseconds; None before the plan is known.
        failures: how often delivery failed or was fenced, and was begun again.
        error: the last failure; empty when there was none.
    """

    partition: int
    state: RunnerState
    revision: int
    next_index: int
    progress: ShardProgress | None
    behind_s: float
    failures: int
    error: str
    waiting_ms: int | None = None


class ShardRunner:
    """Sends one shard, one :meth:`step` after another; :meth:`start` has a thread of its own take them.

    Args:
        partition: the shard.
        make_model: makes what draws the shard's ratings.
        open_delivery: makes a fresh delivery of this shard.
        commit_interval_ms: time between commits, milliseconds.
        clock: tells the time.
        policy: decides whether to begin again after a failure.
    """

    def __init__(
        self,
        partition: int,
        make_model: Callable[[], ShardModel],
        open_delivery: Callable[[], ShardDelivery],
        commit_interval_ms: int,
        clock: Clock,
        policy: RestartPolicy,
    ) -> None:
        self.partition = partition
        self._make_model = make_model
        self._open_delivery = open_delivery
        self._commit_interval_ms = commit_interval_ms
        self._clock = clock
        self._policy = policy
        # of the thread that takes the steps
        self._model: ShardModel | None = None
        self._delivery: ShardDelivery | None = None
        self._uncommitted = 0
        self._standing = Standing(None, None)
        self._last_commit_ms = 0
        # of all threads, guarded by the lock
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = False
        self._state = RunnerState.OPENING
        self._assignment: Assignment | None = None
        self._shard: Shard | None = None
        self._committed: ShardProgress | None = None
        self._plan_changed = False
        self._leash_ms: int | None = None
        self._failures = 0
        self._error = ""
        self._thread = threading.Thread(target=self._run, name=f"shard-{partition}", daemon=True)

    # -- asked from outside

    def start(self) -> None:
        """Begin, on a thread of its own."""
        self._thread.start()

    def tell(self, assignment: Assignment | None, leash_ms: int | None = None) -> None:
        """Tell that the shard is this runner's, and what is wanted; as often as you like.

        A runner that was fenced begins again: one that nobody tells anything any more never does.

        Args:
            assignment: None = nothing new.
            leash_ms: nothing is sent that is due after this event time; None = as the event clock says.
        """
        with self._lock:
            self._leash_ms = leash_ms
            known = 0 if self._assignment is None else self._assignment.revision
            if assignment is not None and assignment.revision > known:
                self._assignment = assignment
                if self._shard is not None:
                    self._shard.follow(RatePlan(assignment.epochs), assignment.end_index)
                    self._plan_changed = True
                self._wake.set()
            if self._state is RunnerState.FENCED:
                self._state = RunnerState.OPENING
                self._wake.set()

    def stop(self) -> None:
        """Commit what was sent and end; does not wait."""
        with self._lock:
            self._stop = True
            self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the thread; False when the time ran out."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def report(self) -> ShardReport:
        """How it stands."""
        with self._lock:
            shard, assignment = self._shard, self._assignment
            behind_ms = 0
            over = (RunnerState.DONE, RunnerState.STOPPED, RunnerState.FAILED)
            if shard is not None and assignment is not None and self._state not in over:
                behind_ms = max(0, self._clock.now_ms() - assignment.clock.wall_ms(shard.next_due_ms()))
            next_index = self._committed.next_index if self._committed else 0
            return ShardReport(
                partition=self.partition,
                state=self._state,
                # told is not followed: before there is a shard nobody knows how late it is
                revision=0 if assignment is None or shard is None else assignment.revision,
                next_index=next_index,
                progress=self._committed,
                behind_s=behind_ms / 1000.0,
                failures=self._failures,
                error=self._error,
                waiting_ms=None if shard is None else shard.due_ms(next_index),
            )

    # -- the steps

    def step(self) -> float | None:
        """Do the next thing; may block on the broker.

        Returns:
            For how long there is nothing to do unless somebody tells something, seconds; None when it has ended for good.
        """
        wait_s = self._guarded_step()
        if wait_s is None:
            self._close()
        return wait_s

    def _guarded_step(self) -> float | None:
        with self._lock:
            self._wake.clear()
            state = self._state
        try:
            if state is RunnerState.OPENING:
                return self._open()
            if state is RunnerState.RUNNING:
                return self._send()
            return self._wait_to_be_told()
        except FencedError as error:
            return self._failed(error, RunnerState.FENCED)
        except (DeliveryError, BrokerUnavailableError) as error:
            return self._failed(error, RunnerState.OPENING)
        except Exception as error:  # noqa: BLE001 - the last line of its thread: reported, and shown as failed
            _log.exception("shard %d failed", self.partition)
            self._fail(str(error) if isinstance(error, RayPipelineError) else f"{type(error).__name__}: {error}")
            return None

    def _run(self) -> None:
        while (wait_s := self.step()) is not None:
            self._clock.wait(self._wake, wait_s)

    def _open(self) -> float:
        """Shut out predecessors, and learn how far they came."""
        if self._model is None:
            self._model = self._make_model()
        self._close()
        self._delivery = self._open_delivery()
        recorded = self._delivery.open(_OPEN_DEADLINE_S)
        if recorded is None:
            check_that_none_was_sent(self._model, self._delivery.oldest(_LOOK_AT_FIRST, _OPEN_DEADLINE_S))
        standing = Standing.of(self._model, recorded, self._delivery.newest(LOOK_AT, _OPEN_DEADLINE_S))
        if standing.held < standing.said:  # or somebody's copies of old ratings lie behind the others
            standing = Standing.of(self._model, recorded, self._delivery.newest(_LOOK_FURTHER, _OPEN_DEADLINE_S))
        if standing.held != standing.said:
            _log.warning(
                "shard %d: its partition holds %d ratings, its progress record says %d: it goes on with rating %d",
                *(self.partition, standing.held, standing.said, standing.held),
            )
        self._uncommitted = 0
        with self._lock:
            self._standing, self._committed = standing, standing.progress
            if self._shard is not None:
                self._shard.resume(standing)
            self._state = RunnerState.READY
        return 0.0

    def _wait_to_be_told(self) -> float | None:
        with self._lock:
            assignment, state = self._assignment, self._state
            if self._stop:
                self._state = RunnerState.DONE if state is RunnerState.DONE else RunnerState.STOPPED
                return None
            if state is RunnerState.READY and assignment is not None:
                self._begin(assignment)
                return 0.0
            if state is RunnerState.DONE and self._plan_changed:
                self._state = RunnerState.RUNNING
                return 0.0
            return _LONGEST_WAIT_S

    def _begin(self, assignment: Assignment) -> None:
        """Make the shard, where it was not made before; the lock is held."""
        if self._shard is None:
            assert self._model is not None
            plan = RatePlan(assignment.epochs)
            told = assignment
            shard = Shard(self._model, told.share, told.phase, plan, told.end_index, told.poisson_seed)
            shard.resume(self._standing)
            self._shard = shard
        self._plan_changed = True
        self._last_commit_ms = self._clock.now_ms()
        self._state = RunnerState.RUNNING

    def _send(self) -> float | None:
        shard, assignment, delivery = self._shard, self._assignment, self._delivery
        assert shard is not None
        assert assignment is not None
        assert delivery is not None
        now_ms = self._clock.now_ms()
        with self._lock:
            stopping, changed = self._stop, self._plan_changed
            until_ms = assignment.clock.event_ms(now_ms)
            until_ms = until_ms if self._leash_ms is None else min(until_ms, self._leash_ms)
            # the plan goes on record first: whatever half of a commit is kept, it has the time of each rating that was sent
            due = 0 if stopping or changed else shard.due_now(until_ms)
            batch = shard.take(min(due, MOST_RATINGS_AT_ONCE)) if due else None
            ending = stopping or shard.done
        if not self._uncommitted and batch is None:
            self._last_commit_ms = now_ms
        if batch is not None:
            delivery.send(batch)
            self._uncommitted += len(batch)
        late_enough = now_ms - self._last_commit_ms >= self._commit_interval_ms
        if changed or ending or (self._uncommitted and late_enough):
            self._commit(delivery, shard, assignment)
            self._last_commit_ms = now_ms
        if ending:
            return self._over(shard)
        return 0.0 if changed or due > MOST_RATINGS_AT_ONCE else self._next_wait_s(shard, assignment)

    def _next_wait_s(self, shard: Shard, assignment: Assignment) -> float:
        """Until there is something worth doing.

        With ratings waiting for their commit: until the commit, which is when they are seen, or until so many more are due
        that sending them should not wait for it.
        """
        now_ms = self._clock.now_ms()
        with self._lock:
            ahead = _WORTH_SENDING if self._uncommitted else 0
            next_ms = assignment.clock.wall_ms(shard.next_due_ms(ahead)) - now_ms
        wait_s = max(_TICK_S, min(next_ms / 1000.0, _LONGEST_WAIT_S))
        if self._uncommitted:
            wait_s = min(wait_s, max(0.001, (self._last_commit_ms + self._commit_interval_ms - now_ms) / 1000.0))
        return wait_s

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
                poisson_seed=assignment.poisson_seed,
            )
            # as of now: a plan may have been told since the step began
            changed, self._plan_changed = self._plan_changed, False
        delivery.commit(progress)
        self._uncommitted = 0
        with self._lock:
            self._committed = progress
        if changed:
            delivery.confirm(progress, _CONFIRM_DEADLINE_S)

    def _over(self, shard: Shard) -> float | None:
        """All is committed that was taken. Decided under the lock: the end may have been moved meanwhile."""
        with self._lock:
            if shard.done:
                self._state = RunnerState.DONE
            elif self._stop:
                self._state = RunnerState.STOPPED
                return None
            return 0.0

    # -- failures and the end

    def _failed(self, error: DeliveryError | BrokerUnavailableError, then: RunnerState) -> float | None:
        """Let go of the delivery: what of it was committed is learned when the next one is opened."""
        self._close()
        if isinstance(error, NotAllowedError) or self._policy.failed(self._clock.now_ms()) is Decision.GIVE_UP:
            self._fail(_given_up(error))
            return None
        _log.warning("shard %d: %s", self.partition, error)
        with self._lock:
            self._failures += 1
            self._error = str(error)
            self._state = then
            self._plan_changed = True
        return self._policy.backoff_s

    def _fail(self, error: str) -> None:
        with self._lock:
            self._error = error
            self._state = RunnerState.FAILED

    def _close(self) -> None:
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            try:
                delivery.close()
            except Exception:  # noqa: BLE001 - whatever it still holds is shut out when the next one is opened
                _log.warning("shard %d: its delivery could not be closed", self.partition, exc_info=True)


def _given_up(error: DeliveryError | BrokerUnavailableError) -> str:
    if isinstance(error, FencedError):
        return (
            f"{error}. Another producer takes the shard over again and again: does a second pipeline write to this topic? "
            "Stop it, or give one of them another --ratings-topic and --progress-topic"
        )
    return str(error)
