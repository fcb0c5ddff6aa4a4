"""How the ratings of a shard follow each other, in operational time: one rating a unit, whatever the rate.

Regular arrivals come one by one, half a step or another phase after each other. Poisson arrivals are a Poisson process of rate 1,
with random access: the ratings come in blocks of 1,024, the length of a block has the gamma law of so many gaps, and inside it the
ratings lie as sorted uniform numbers do, given that the last one is at the block's end (Devroye, "Non-uniform random variate
generation", 1986, chapter VI).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ray_pipeline.model.streams import WORDS_PER_COUNTER, normal_table, words

__all__ = ["Arrivals", "PoissonArrivals", "RegularArrivals", "poisson_arrivals"]

_BLOCK = 1024
_FRACTION = 2**20  # lengths of blocks are whole numbers of this part of a rating, so that their sums are exact
_BLOCKS_AT_ONCE = 1024
_BLOCKS_KEPT = 16
_PROCESSES = 64
_UNIFORM = 2.0**-53

Points = npt.NDArray[np.float64]


class Arrivals(Protocol):
    """Points in operational time."""

    def points(self, first: int, count: int) -> Points:
        """Of ratings ``first … first + count - 1``, shape (count,), float64, > 0, not decreasing."""
        ...

    def points_at(self, indexes: npt.NDArray[np.int64]) -> Points:
        """Of any ratings, shape as ``indexes``."""
        ...

    def point(self, index: int) -> float:
        """Of one rating."""
        ...

    def count_upto(self, point: float) -> int:
        """How many ratings have come at a point, the ones there included."""
        ...

    def spread(self, count: int) -> int:
        """So many ratings, more or less than ``count``, may have come at point ``count``."""
        ...


class RegularArrivals:
    """One after the other at the same distance.

    Args:
        phase: point of the first one, 0 < phase < 1; sets the shards apart so that they do not fire together.
    """

    def __init__(self, phase: float) -> None:
        self.phase = phase

    def points(self, first: int, count: int) -> Points:
        """See :meth:`Arrivals.points`."""
        return np.arange(first, first + count, dtype=np.float64) + self.phase

    def points_at(self, indexes: npt.NDArray[np.int64]) -> Points:
        """See :meth:`Arrivals.points_at`."""
        return indexes.astype(np.float64) + self.phase

    def point(self, index: int) -> float:
        """See :meth:`Arrivals.point`."""
        return index + self.phase

    def count_upto(self, point: float) -> int:
        """See :meth:`Arrivals.count_upto`."""
        return max(0, math.floor(point - self.phase) + 1)

    def spread(self, count: int) -> int:
        """None."""
        return 0


class PoissonArrivals:
    """At random, as independent people come.

    Args:
        seed: the run's seed.
        partition: the shard.
    """

    def __init__(self, seed: int, partition: int) -> None:
        self._blocks = _blocks(seed, partition)

    def points(self, first: int, count: int) -> Points:
        """See :meth:`Arrivals.points`."""
        if not count:
            return np.empty(0, np.float64)
        low, high = first // _BLOCK, (first + count - 1) // _BLOCK + 1
        found = self._blocks.inside(low, high - low).reshape(-1) if high - low > 2 else self._kept(low, high)
        return found[first - low * _BLOCK :][:count]

    def points_at(self, indexes: npt.NDArray[np.int64]) -> Points:
        """See :meth:`Arrivals.points_at`."""
        which, rest = np.divmod(indexes, _BLOCK)
        found = np.empty(len(indexes), np.float64)
        for block in np.unique(which).tolist():
            here = which == block
            found[here] = self._blocks.one(block)[rest[here]]
        return found

    def point(self, index: int) -> float:
        """See :meth:`Arrivals.point`."""
        return float(self._blocks.one(index // _BLOCK)[index % _BLOCK])

    def count_upto(self, point: float) -> int:
        """See :meth:`Arrivals.count_upto`."""
        if point <= 0:
            return 0
        block = self._blocks.holding(point)
        return block * _BLOCK + int(np.searchsorted(self._blocks.one(block), point, side="right"))

    def spread(self, count: int) -> int:
        """Eight standard deviations."""
        return 8 * math.isqrt(count + 1) + 8

    def _kept(self, low: int, high: int) -> Points:
        return np.concatenate([self._blocks.one(block) for block in range(low, high)])


def poisson_arrivals(seed: int | None, partition: int) -> PoissonArrivals | None:
    """Of a shard, by the seed that its progress record has; None = its arrivals are regular."""
    return None if seed is None else PoissonArrivals(seed, partition)


class _Blocks:
    """Blocks of a Poisson process. Keeps where each begins (8 to 16 bytes a 1,024 ratings) and the few that were asked for last."""

    def __init__(self, seed: int, partition: int) -> None:
        self._seed = seed
        self._partition = partition
        self._starts = np.zeros(1, np.int64)
        self.one = lru_cache(_BLOCKS_KEPT)(lambda block: self.inside(block, 1)[0])

    def inside(self, first: int, count: int) -> Points:
        """The points of ``count`` blocks, shape (count, 1024)."""
        starts = self._begins(first + count)[first : first + count + 1]
        per_block = _BLOCK // WORDS_PER_COUNTER
        drawn = words(self._seed, "arrivals", self._partition, first * per_block, count * per_block)
        uniform = (drawn.reshape(count, _BLOCK) >> np.uint64(11)).astype(np.float64) * _UNIFORM
        uniform[:, -1] = 1.0  # the block ends with its last rating
        uniform.sort(axis=1)
        begin = starts[:-1, None].astype(np.float64) / _FRACTION
        length = np.diff(starts)[:, None].astype(np.float64) / _FRACTION
        return begin + length * uniform

    def holding(self, point: float) -> int:
        """The block that a point lies in."""
        starts = self._begins(int(point / _BLOCK) + 2)
        while starts[-1] < point * _FRACTION:
            starts = self._begins(len(starts) + int((point - starts[-1] / _FRACTION) / _BLOCK) + 1)
        return max(0, int(np.searchsorted(starts, point * _FRACTION, side="left")) - 1)

    def _begins(self, blocks: int) -> npt.NDArray[np.int64]:
        """Where each block begins, and where the last one ends: at least ``blocks`` + 1."""
        starts = self._starts  # another thread may put a longer one, of the same numbers, in its place
        known = len(starts)
        if known > blocks:
            return starts
        grown = np.empty(
            max(blocks + 1, 2 * known, _BLOCKS_AT_ONCE), np.int64
        )  # doubled, so that each is copied a few times at most
        grown[:known] = starts
        for first in range(known, len(grown), _BLOCKS_AT_ONCE):
            here = grown[first : first + _BLOCKS_AT_ONCE]
            here[:] = grown[first - 1] + np.cumsum(self._lengths(first - 1, len(here)))
        self._starts = grown
        return grown

    def _lengths(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Gamma variates of shape 1,024: the cube of a normal one (Wilson and Hilferty, 1931)."""
        drawn = words(self._seed, "arrival blocks", self._partition, first, count)
        fine = (drawn[:, 0] & np.uint64(0xFFFF)).astype(np.int64)
        normal = normal_table()[fine].astype(np.float64)
        root = 1.0 - 1.0 / (9 * _BLOCK) + normal / (3.0 * math.sqrt(_BLOCK))
        return np.floor(_BLOCK * (root * root * root) * _FRACTION).astype(np.int64)


@lru_cache(maxsize=_PROCESSES)
def _blocks(seed: int, partition: int) -> _Blocks:
    return _Blocks(seed, partition)
