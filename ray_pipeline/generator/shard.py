"""What one shard does next: a state machine with no clock, no thread and no Kafka."""

from __future__ import annotations

from ray_pipeline.delivery.interface import Epoch
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.plan import NEVER_MS, RatePlan, ShardSchedule
from ray_pipeline.model.ratings import ShardModel

__all__ = ["Shard"]


class Shard:
    """One partition's ratings, from an index on.

    Invariant: ``first_index ≤ next_index``, and ``next_index ≤ end_index`` when there is an end.

    Args:
        model: draws the ratings.
        share: the shard's share of all ratings.
        phase: the shard's phase, see :class:`ShardSchedule`.
        plan: the rate plan.
        next_index: where to begin.
        end_index: where to end (exclusive); None = never.
    """

    def __init__(
        self,
        model: ShardModel,
        share: float,
        phase: float,
        plan: RatePlan,
        next_index: int,
        end_index: int | None,
    ) -> None:
        self.partition = model.partition
        self.first_index = next_index
        self.next_index = next_index
        self.end_index = end_index
        self.last_event_ms: int | None = None
        self._model = model
        self._schedule = ShardSchedule(plan, share, phase)

    @property
    def plan(self) -> RatePlan:
        """The plan as this shard lived it."""
        return self._schedule.plan

    @property
    def done(self) -> bool:
        """Whether the last rating was taken."""
        return self.end_index is not None and self.next_index >= self.end_index

    def due_now(self, now_ms: int) -> int:
        """How many ratings wait to be sent at an event time."""
        due = self._schedule.count_due(now_ms)
        if self.end_index is not None:
            due = min(due, self.end_index)
        return max(0, due - self.next_index)

    def next_due_ms(self, ahead: int = 0) -> int:
        """Event time of the next rating, or of one ``ahead``, epoch milliseconds; :data:`NEVER_MS` when done or paused."""
        index = self.next_index + ahead
        if self.end_index is not None:
            index = min(index, self.end_index - 1)
        return NEVER_MS if self.done else int(self._schedule.due_ms(index, 1)[0])

    def behind_ms(self, now_ms: int) -> int:
        """How long the next rating has been due."""
        return max(0, now_ms - self.next_due_ms())

    def take(self, count: int) -> EventBatch:
        """The next ``count`` ratings, which must be due; the shard moves past them."""
        times = self._schedule.due_ms(self.next_index, count)
        drawn = self._model.draw(self.next_index, count)
        batch = EventBatch(self.partition, self.next_index, drawn.user_ids, drawn.movie_ids, drawn.half_stars, times)
        self.next_index = batch.next_index
        if count:
            self.last_event_ms = int(times[-1])
        return batch

    def rewind(self, next_index: int, event_ms: int | None) -> None:
        """Go back to where the last commit was; what was taken since will be taken again, the same."""
        self.next_index = next_index
        self.last_event_ms = event_ms

    def change_rate(self, epoch: Epoch) -> Epoch:
        """Go on with another rate.

        A rating that was taken keeps its time: where the shard is already past ``epoch.from_ms`` the change takes effect just
        after its last rating.

        Returns:
            The epoch as it took effect.
        """
        earliest = epoch.from_ms if self.last_event_ms is None else self.last_event_ms + 1
        lived = Epoch(max(epoch.from_ms, earliest), epoch.rate)
        self._schedule = ShardSchedule(self.plan.with_epoch(lived), self._schedule.share, self._schedule.phase)
        return lived
