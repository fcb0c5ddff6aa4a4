"""What one rating is, in columns."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["HALF_STARS_MAX", "HALF_STARS_MIN", "ID_MOST", "EventBatch", "Fault", "id_in"]

HALF_STARS_MIN = 1
"""Lowest rating, in half stars: 0.5 stars."""
HALF_STARS_MAX = 10
"""Highest rating, in half stars: 5.0 stars."""
ID_MOST = 2**31 - 1
"""Greatest id of a user or movie."""


def id_in(text: str) -> int | None:
    """The id of a user or movie that a text is, in digits; None where it is none."""
    digits = text.lstrip("0") if text.isascii() and text.isdigit() else ""
    # int() refuses thousands of digits
    found = int(digits) if 1 <= len(digits) <= len(str(ID_MOST)) else 0
    return found if 1 <= found <= ID_MOST else None


class Fault(enum.IntEnum):
    """What is wrong with a record, on purpose; those from ``MALFORMED`` on leave no valid rating."""

    NONE = 0
    LATE = 1
    OUT_OF_ORDER = 2
    DUPLICATE = 3
    FUTURE = 4
    UNKNOWN_FIELD = 5
    MALFORMED = 6
    MISSING_FIELD = 7
    OUT_OF_RANGE = 8
    TOMBSTONE = 9


@dataclass(frozen=True, slots=True)
class EventBatch:
    """A run of consecutive ratings of one shard.

    A record whose text is broken on purpose has the rating here that it would have been.

    Attributes:
        partition: the shard, which is the partition of the ratings topic.
        first_index: index of the first rating in its shard, ≥ 0.
        user_ids: shape (n,), int64, 1 … users.
        movie_ids: shape (n,), int64, ids of the catalogue.
        half_stars: shape (n,), uint8, the rating in half stars, 1 … 10.
        timestamps_ms: shape (n,), int64, event time, epoch milliseconds UTC: the intended one, not decreasing, unless faults are on.
        faults: shape (n,), uint8, a :class:`Fault` each; None = nothing is broken on purpose.
        details: shape (n,), uint32, which of many ways a text is broken in; None with ``faults``.
    """

    partition: int
    first_index: int
    user_ids: npt.NDArray[np.int64]
    movie_ids: npt.NDArray[np.int64]
    half_stars: npt.NDArray[np.uint8]
    timestamps_ms: npt.NDArray[np.int64]
    faults: npt.NDArray[np.uint8] | None = None
    details: npt.NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def next_index(self) -> int:
        """Index of the rating after the last one."""
        return self.first_index + len(self)

    def where(self, chosen: npt.NDArray[np.bool_]) -> EventBatch:
        """Some of the ratings, by a mask of shape (n,); their indexes need no longer follow one another."""
        return self._columns(self.first_index, chosen)

    def slice(self, start: int, stop: int) -> EventBatch:
        """The ratings at positions ``start … stop - 1`` of this batch, without copying."""
        return self._columns(self.first_index + start, slice(start, stop))

    def _columns(self, first_index: int, chosen: Any) -> EventBatch:
        columns = {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        arrays: dict[str, Any] = {name: None if c is None else c[chosen] for name, c in columns.items()}
        return EventBatch(self.partition, first_index, **arrays)
