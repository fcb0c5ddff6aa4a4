"""Which records of a shard a job must take, and how many there are up to an index, where some are broken on purpose."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from ray_pipeline.model.faults import Faults

__all__ = ["ValidRecords"]

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
