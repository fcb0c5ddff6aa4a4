"""What one shard does next: a state machine with no clock, no thread and no Kafka."""

from __future__ import annotations

from collections.abc import Sequence

from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import StateMismatchError
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.plan import NEVER_MS, RatePlan, ShardSchedule
from ray_pipeline.generator.sequence import ShardSequence
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
    """

    def __init__(self, model: ShardModel, share: float, phase: float, plan: RatePlan, end_index: int | None) -> None:
        self.partition = model.partition
        self.next_index = 0
        self.end_index = end_index
        self.last_event_ms: int | None = None
        self._model = model
        self._schedule = ShardSchedule(plan, share, phase)

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
        batch = ShardSequence(self._model, self._schedule, self.next_index).events(self.next_index, count)
        self.next_index = batch.next_index
        if count:
            self.last_event_ms = int(batch.timestamps_ms[-1])
        return batch

    def follow(self, plan: RatePlan, end_index: int | None) -> None:
        """Go on as ``plan`` says, to another end; an end below what was taken already ends at once.

        Where the shard is already past a change of rate, the change takes effect just after its last rating.
        """
        self._schedule = self._schedule.going_on(plan, self.next_index)
        self.end_index = end_index

    def resume(self, progress: ShardProgress | None, newest: Sequence[bytes | None] = (None,)) -> int:
        """Go to where the last commit was: what was committed stays as it was lived, whoever lived it.

        As a rule the partition holds as many ratings as the progress record says. After a broker lost its disk, or was killed in
        a commit, it may hold fewer: they are sent once more, with the times that they had. Or more: those are not sent again.

        Args:
            progress: the committed progress; None = nothing was committed.
            newest: values of the newest records of the partition, the last one first; none when it never had any. As a
                default, nothing is known of them.

        Returns:
            How many ratings the partition holds.

        Raises:
            StateMismatchError: the record's plan does not lead to the time that it has for its last rating.
        """
        said = 0 if progress is None else progress.next_index
        lived = self._schedule
        if progress is not None and said:
            lived = ShardSequence.of(self._model, progress).schedule
            last_ms = int(lived.due_ms(said - 1, 1)[0])
            if last_ms != progress.event_time_ms:
                raise StateMismatchError(
                    problem=f"the progress record of shard {self.partition} contradicts itself: rating "
                    f"{said - 1} was sent with time {progress.event_time_ms}, its plan says {last_ms}",
                    fix="It was not written by this pipeline: give another topic, or clear it with: ray-pipeline reset",
                )
        # ratings that are on no record were sent as this plan says, or as the former owner's would have gone on
        ways = (lived.going_on(self.plan, said), lived)
        found = [(ShardSequence(self._model, way, said).held(newest), way) for way in ways]
        (held, _), way = max(found, key=lambda one: one[0][1])
        self._schedule = way.going_on(self.plan, max(held, said))
        self.next_index = held
        self.last_event_ms = int(way.due_ms(held - 1, 1)[0]) if held else None
        return held
