"""Ratings that came from outside and were written into the topic of ratings by us: which, and where they stand.

The shards' ratings follow from the settings; these do not, so each has a record of its own in topic ``ratings.outside``, written in
the transaction that holds the rating. Whoever compares can so tell them from ratings that nobody owns up to.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from ray_pipeline.codec import encode_keys, encode_values, number_in, whole_in
from ray_pipeline.events import EventBatch

__all__ = ["OutsideRatings"]


@dataclass
class _Partition:
    """Columns, ascending by offset; ``newest`` is the greatest time up to each of them."""

    offsets: array[int] = field(default_factory=lambda: array("q"))
    users: array[int] = field(default_factory=lambda: array("q"))
    movies: array[int] = field(default_factory=lambda: array("q"))
    halves: array[int] = field(default_factory=lambda: array("b"))
    times: array[int] = field(default_factory=lambda: array("q"))
    newest: array[int] = field(default_factory=lambda: array("q"))


class OutsideRatings:
    """Takes the records of topic ``ratings.outside`` in, in any order; one that comes twice changes nothing.

    Holds some 50 bytes a rating.
    """

    def __init__(self) -> None:
        self._partitions: dict[int, _Partition] = {}

    def add(self, record: Any) -> None:
        """A record of topic ``ratings.outside``, read from JSON.

        Raises:
            ValueError: it is none.
        """
        try:
            self._add(record if isinstance(record, dict) else {})
        except ValueError as error:
            msg = f"not a record of a rating from outside ({error}): {str(record)[:200]}"
            raise ValueError(msg) from error

    def _add(self, record: Mapping[str, Any]) -> None:
        partition, offset, half = (
            whole_in(record, "partition"),
            whole_in(record, "offset"),
            number_in(record, "rating", 5) * 2,
        )
        row = (whole_in(record, "userId"), whole_in(record, "movieId"), round(half), whole_in(record, "timestamp"))
        of = self._partitions.setdefault(partition, _Partition())
        at = bisect_left(of.offsets, offset)
        if at < len(of.offsets) and of.offsets[at] == offset:
            return
        of.offsets.insert(at, offset)
        for column, value in zip((of.users, of.movies, of.halves, of.times), row, strict=True):
            column.insert(at, value)
        before = [of.newest[at - 1]] if at else []
        of.newest[at:] = array("q", list(accumulate([*before, *of.times[at:]], max))[len(before) :])

    def counts(self) -> dict[int, int]:
        """How many there are, by partition."""
        return {p: len(of.offsets) for p, of in sorted(self._partitions.items())}

    def before(self, partition: int, offset: int) -> int:
        """How many of them stand before an offset."""
        of = self._partitions.get(partition)
        return 0 if of is None else bisect_left(of.offsets, offset)

    def newest_ms(self, partition: int, offset: int) -> int:
        """The newest event time among those before an offset, epoch milliseconds; -1 where there is none."""
        count = self.before(partition, offset)
        return self._partitions[partition].newest[count - 1] if count else -1

    def between(self, partition: int, first: int, until: int) -> EventBatch:
        """Those at offsets ``first … until - 1``, in order of their times; their index counts the ones of the partition."""
        lo, hi = self.before(partition, first), self.before(partition, until)
        of = self._partitions.get(partition, _Partition())
        times = np.array(of.times[lo:hi], np.int64)
        order = np.argsort(times, kind="stable")
        users, movies, halves = (np.array(c[lo:hi], np.int64)[order] for c in (of.users, of.movies, of.halves))
        return EventBatch(partition, lo, users, movies, halves.astype(np.uint8), times[order])

    def holds(self, partition: int, offset: int, key: bytes | None, value: bytes | None) -> bool:
        """Whether one of them stands at an offset, with this key and value."""
        found = self.between(partition, offset, offset + 1)
        return len(found) == 1 and encode_keys(found)[0] == key and encode_values(found)[0] == value
