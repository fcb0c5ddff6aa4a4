"""The ratings of one shard with their times, and which of them a record is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.codec import encode_values
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.plan import RatePlan, ShardSchedule
from ray_pipeline.model.ratings import ShardModel

__all__ = ["ShardSequence"]

_BEYOND = 1_000_000
"""So many ratings more than a shard says it has sent are still recognised as its own."""


@dataclass(frozen=True, slots=True)
class ShardSequence:
    """What one shard sends, as it lived it, and as it would go on.

    Attributes:
        model: draws the ratings.
        schedule: has their times.
        sent: how many ratings the shard says it has sent.
    """

    model: ShardModel
    schedule: ShardSchedule
    sent: int

    @classmethod
    def of(cls, model: ShardModel, progress: ShardProgress) -> ShardSequence:
        """By a progress record of the shard."""
        schedule = ShardSchedule(RatePlan(progress.epochs), progress.share, progress.phase)
        return cls(model, schedule, progress.next_index)

    def events(self, first: int, count: int) -> EventBatch:
        """Ratings ``first … first + count - 1``."""
        drawn = self.model.draw(first, count)
        times = self.schedule.due_ms(first, count)
        return EventBatch(self.model.partition, first, drawn.user_ids, drawn.movie_ids, drawn.half_stars, times)

    def due_ms(self, index: int) -> int:
        """Event time of one rating, epoch milliseconds; ``plan.NEVER_MS`` where the plan does not reach it."""
        return int(self.schedule.due_ms(index, 1)[0])

    def first_at(self, times_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Index of the first rating that is due at each event time or later, not beyond those that may have been sent.

        Args:
            times_ms: shape (n,), int64, epoch milliseconds, in any order.

        Returns:
            Shape (n,), int64.
        """
        return self.schedule.count_before(times_ms, self.sent + _BEYOND)

    def at(self, event_ms: int) -> range:
        """Indexes of the ratings that are due at an event time, to the millisecond, among those that may have been sent."""
        start, stop = self.first_at(np.array([event_ms, event_ms + 1], np.int64)).tolist()
        return range(start, stop)

    def index_of(self, value: bytes | None, at_least: int = 0) -> int | None:
        """Which rating of the shard a record's value is; None when it is none.

        Args:
            value: the record's value; its text does not matter, its four fields do.
            at_least: of several equal ratings, the first from here on is meant, else the last.
        """
        rating = _rating(value)
        indexes = self.at(rating["timestamp"]) if rating else range(0)
        if not rating or not indexes:
            return None
        events = self.events(indexes.start, len(indexes))
        same = (
            (events.user_ids == rating["userId"])
            & (events.movie_ids == rating["movieId"])
            & (events.half_stars == rating["rating"] * 2)
        )
        found = [indexes.start + n for n in np.flatnonzero(same).tolist()]
        return next((i for i in found if i >= at_least), found[-1] if found else None)

    def held(self, newest: Sequence[bytes | None]) -> int:
        """How many ratings a partition holds, by its newest records: those that the shard says it has sent, as a rule.

        What else lies there, put there by somebody, is passed over; one rating may look like another of the same
        millisecond, so it is the number that explains the most of the records.

        Args:
            newest: values of the newest committed records of the partition, the last one first; none when it never had any.
        """
        if not newest:
            return 0
        if self.sent and newest[0] == encode_values(self.events(self.sent - 1, 1))[0]:
            return self.sent
        ends = {index + 1 for value in newest if (index := self.index_of(value)) is not None}
        there = {value for value in newest if value is not None}
        explained = {}
        for end in ends:
            first = max(0, end - len(newest))
            explained[end] = len(there.intersection(encode_values(self.events(first, end - first))))
        return max(explained, key=lambda end: (explained[end], end), default=self.sent)


def _rating(value: bytes | None) -> dict[str, Any] | None:
    """The four fields of a record's value, when it has just these and they are numbers in range."""
    try:
        rating = json.loads(value or b"")
    except ValueError:
        return None
    if not isinstance(rating, dict) or set(rating) != {"userId", "movieId", "rating", "timestamp"}:
        return None
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in rating.values()):
        return None
    whole = all(isinstance(rating[n], int) and 0 < rating[n] < 2**53 for n in ("userId", "movieId", "timestamp"))
    return rating if whole else None
