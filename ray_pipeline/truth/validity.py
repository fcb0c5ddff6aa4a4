"""Which records of a shard a job must take, or can be predicted, and how many up to an index, where some are broken on purpose."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from ray_pipeline.events import Fault
from ray_pipeline.model.faults import BROKEN, Faults

__all__ = ["FreshRecords", "ValidRecords"]

_BLOCK = 1 << 16


class ValidRecords:
    """Counts the valid records of a shard; what was counted is remembered, a number a block.

    Args:
        faults: the shard's.
        guard_ms: how far ahead of its sending an event time may lie, milliseconds; 0 = as far as it likes.

    Attributes:
        rejects: shape (faults,), bool: which faults make the job reject a record.
    """

    def __init__(self, faults: Faults, guard_ms: int) -> None:
        self.rejects = faults.rejects(guard_ms)
        self._faults = faults
        self._valid = [0]  # in all blocks before each

    def records(self, valid: int) -> int:
        """How many records there are up to and including the valid one of this number, counted from 1; 0 for 0."""
        if valid <= 0:
            return 0
        while self._valid[-1] < valid:
            block = len(self._valid) - 1
            self._valid.append(self._valid[-1] + int(self._taken(block * _BLOCK, _BLOCK).sum()))
        block = bisect_left(self._valid, valid) - 1
        counts = np.cumsum(self._taken(block * _BLOCK, _BLOCK))
        return block * _BLOCK + int(np.searchsorted(counts, valid - self._valid[block])) + 1

    def _taken(self, first: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        found: np.ndarray[tuple[int], np.dtype[np.bool_]] = ~self.rejects[self._faults.kinds(first, count)]
        return found


class FreshRecords:
    """Counts the records of a shard that are ratings, and repeat none; what was counted is remembered, a number a block.

    10 to 20 ns a record, when it is counted for the first time.

    Args:
        faults: the shard's.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._fresh = [0]  # in all blocks before each

    def before(self, index: int) -> int:
        """How many of them there are before a record."""
        block, rest = divmod(index, _BLOCK)
        while len(self._fresh) <= block:
            self._fresh.append(self._fresh[-1] + self._count(len(self._fresh) - 1, _BLOCK))
        return self._fresh[block] + self._count(block, rest)

    def _count(self, block: int, count: int) -> int:
        """How many of them are among the first records of a block."""
        kinds = self._faults.kinds(block * _BLOCK, count)
        if not block:  # what has nothing before it that it could repeat is a rating of its own
            kinds = self._faults.fates(0, count, lambda _, n: np.zeros(n, np.int64)).faults
        return int(((kinds < BROKEN) & (kinds != Fault.DUPLICATE)).sum())
