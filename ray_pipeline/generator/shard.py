"""What one shard does next: a state machine with no clock, no thread and no Kafka."""

from __future__ import annotations

import numpy as np

from ray_pipeline.events import EventBatch
from ray_pipeline.generator.arrivals import poisson_arrivals
from ray_pipeline.generator.plan import NEVER_MS, RatePlan, ShardSchedule
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.generator.standing import Standing
from ray_pipeline.model.ratings import ShardModel

__all__ = ["Shard"]


class Shard:
    """One partition's ratings, from an index on.

    Invariant: a rating that was taken keeps its time, whatever plan is followed afterwards.

    Args:
        model: draws the ratings.
        share: the shard's share of all ratings.
        phase: the shard's phase, see :class:`ShardSchedule`.
        plan: the rate plan to follow.
        end_index: where to end (exclusive); None = never.
        poisson_seed: seed of random arrivals; None = regular ones.
    """

    def __init__(
        self,
        model: ShardModel,
        share: float,
        phase: float,
        plan: RatePlan,
        end_index: int | None,
        poisson_seed: int | None = None,
    ) -> None:
        self.partition = model.partition
        self.next_index = 0
        self.end_index = end_index
        self.last_event_ms: int | None = None
        self._model = model
        self._faults = model.faults
        self._schedule = ShardSchedule(plan, share, phase, poisson_arrivals(poisson_seed, model.partition))

    @property
    def plan(self) -> RatePlan:
        """The plan as this shard lived it, and what it will follow."""
        return self._schedule.plan

    @property
    def done(self) -> bool:
        """Whether the last rating was taken."""
        return self.end_index is not None and self.next_index >= self.end_index

    def due_now(self, now_ms: int) -> int:
        """How many ratings wait to be sent at an event time."""
        since_ms = None if self._faults is None else self._faults.silent_since(now_ms)
        due = self._schedule.count_due(now_ms)
        if since_ms is not None:
            due = int(self._schedule.count_before(np.array([since_ms], np.int64), due)[0])
        if self.end_index is not None:
            due = min(due, self.end_index)
        return max(0, due - self.next_index)

    def next_due_ms(self, ahead: int = 0) -> int:
        """When the next rating is to be sent, or one ``ahead``, event time in epoch milliseconds: when it is due, or a silence is over.

        :data:`NEVER_MS` when done or paused.
        """
        index = self.next_index + ahead
        if self.end_index is not None:
            index = min(index, self.end_index - 1)
        if self.done:
            return NEVER_MS
        due_ms = self._schedule.due_ms(index, 1)
        return int((due_ms if self._faults is None else self._faults.sent_ms(due_ms))[0])

    def due_ms(self, index: int) -> int:
        """Event time of one rating, epoch milliseconds; :data:`NEVER_MS` when it is none of this shard's."""
        beyond = self.end_index is not None and index >= self.end_index
        return NEVER_MS if beyond else int(self._schedule.due_ms(index, 1)[0])

    def take(self, count: int) -> EventBatch:
        """The next ``count`` ratings, which must be due; the shard moves past them."""
        batch = ShardSequence(self._model, self._schedule, self.next_index).events(self.next_index, count)
        self.next_index = batch.next_index
        if count:
            self.last_event_ms = int(self._schedule.due_ms(self.next_index - 1, 1)[0])
        return batch

    def follow(self, plan: RatePlan, end_index: int | None) -> None:
        """Go on as ``plan`` says, to another end; an end below what was taken already ends at once.

        Where the shard is already past a change of rate, the change takes effect just after its last rating.
        """
        self._schedule = self._schedule.going_on(plan, self.next_index)
        self.end_index = end_index

    def resume(self, standing: Standing) -> None:
        """Go to where the partition ends: what was sent stays as it was lived, whoever lived it.

        What the record says was sent and the partition does not hold is sent once more, with the times that it had.
        """
        if standing.recorded is not None:
            lived = ShardSequence.of(self._model, standing.recorded).schedule
            self._schedule = lived.going_on(self.plan, max(standing.held, standing.said))
        self.next_index = standing.held
        self.last_event_ms = standing.progress.event_time_ms if standing.progress else None
