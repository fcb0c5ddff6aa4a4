"""How far a shard is when it is opened: by its progress record, and by what its partition really holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import StateMismatchError
from ray_pipeline.generator.sequence import ShardSequence, has_sent
from ray_pipeline.model.ratings import ShardModel

__all__ = ["Standing", "check_that_none_was_sent"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What a shard finds of itself.

    As a rule the partition holds as many ratings as the record says. After a broker lost its disk, or was killed in a commit, it
    may hold fewer, or more. Either way the record's plan has their times: no rating is sent before its plan is on record.

    Attributes:
        recorded: the newest progress record; None = there is none, so no rating was ever sent (:func:`check_that_none_was_sent`).
        progress: the record as it would be if it said what the partition holds.
    """

    recorded: ShardProgress | None
    progress: ShardProgress | None

    @classmethod
    def of(cls, model: ShardModel, recorded: ShardProgress | None, newest: Sequence[bytes | None]) -> Standing:
        """Compare a shard's record with its partition.

        Args:
            model: draws the shard's ratings.
            recorded: the newest progress record; None = there is none.
            newest: values of the newest records of the partition, the last one first; none when it never had any.

        Raises:
            StateMismatchError: the record's plan does not lead to the time that it has for its last rating.
        """
        if recorded is None:
            return cls(None, None)
        sequence = ShardSequence.of(model, recorded)
        if recorded.next_index and sequence.due_ms(recorded.next_index - 1) != recorded.event_time_ms:
            raise StateMismatchError(
                problem=f"the progress record of shard {recorded.partition} contradicts itself: rating "
                f"{recorded.next_index - 1} was sent with time {recorded.event_time_ms}, "
                f"its plan says {sequence.due_ms(recorded.next_index - 1)}",
                fix="It was not written by this pipeline: give another topic, or clear it with: ray-pipeline reset",
            )
        held = sequence.held(newest)
        last_ms = sequence.due_ms(held - 1) if held else None
        return cls(recorded, replace(recorded, next_index=held, event_time_ms=last_ms))

    @property
    def said(self) -> int:
        """How many ratings were sent, by the record."""
        return self.recorded.next_index if self.recorded else 0

    @property
    def held(self) -> int:
        """How many ratings the partition holds."""
        return self.progress.next_index if self.progress else 0


def check_that_none_was_sent(model: ShardModel, oldest: Sequence[bytes | None]) -> None:
    """Refuse to begin a shard that has no progress record, where its partition begins with its own ratings.

    Their times are on no record, so a stream behind them would be a second one. What somebody else wrote before the first run is
    no obstacle.

    Args:
        model: draws the shard's ratings.
        oldest: values of the first records of the partition.

    Raises:
        StateMismatchError: the shard's first ratings are among them.
    """
    if has_sent(model, oldest):
        raise StateMismatchError(
            problem=f"partition {model.partition} holds ratings of this stream, and no progress record says which",
            fix="Name the topic that the first run kept its progress in (--progress-topic), give another --ratings-topic, "
            "or clear both with: ray-pipeline reset",
        )
