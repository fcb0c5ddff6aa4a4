"""What one rating is, in columns."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

__all__ = ["HALF_STARS_MAX", "HALF_STARS_MIN", "EventBatch"]

HALF_STARS_MIN = 1
"""Lowest rating, in half stars: 0.5 stars."""
HALF_STARS_MAX = 10
"""Highest rating, in half stars: 5.0 stars."""


@dataclass(frozen=True, slots=True)
class EventBatch:
    """A run of consecutive ratings of one shard.

    Attributes:
        partition: the shard, which is the partition of the ratings topic.
        first_index: index of the first rating in its shard, ≥ 0.
        user_ids: shape (n,), int64, 1 … users.
        movie_ids: shape (n,), int64, ids of the catalogue.
        half_stars: shape (n,), uint8, the rating in half stars, 1 … 10.
        timestamps_ms: shape (n,), int64, intended event time, epoch milliseconds UTC, not decreasing.
    """

    partition: int
    first_index: int
    user_ids: npt.NDArray[np.int64]
    movie_ids: npt.NDArray[np.int64]
    half_stars: npt.NDArray[np.uint8]
    timestamps_ms: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def next_index(self) -> int:
        """Index of the rating after the last one."""
        return self.first_index + len(self)

    def slice(self, start: int, stop: int) -> EventBatch:
        """The ratings at positions ``start … stop - 1`` of this batch, without copying."""
        arrays = {f.name: getattr(self, f.name)[start:stop] for f in fields(self)[2:]}
        return EventBatch(self.partition, self.first_index + start, **arrays)
