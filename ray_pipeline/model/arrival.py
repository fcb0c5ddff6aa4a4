"""Who and what is there yet: users and movies that join during the run.

Joining is told in *positions*: ratings of all shards since the run's beginning. A shard knows its own index n alone; its
position is ``n / share`` with the shard's share of all ratings, which is where the whole run stands when all shards keep pace,
and an exact function of n in any case. So a movie joins every shard at the same position, and no shard asks another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.model.alias import AliasTable
from ray_pipeline.model.streams import halfwords_of

__all__ = ["Arrivals", "Joining", "arrivals", "first_at", "joining_words", "positions"]

_UNIT = 2.0**32


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When each of some users, or movies, joins.

    Attributes:
        joins: shape (n,), float64, position from which on it may occur; 0 = from the beginning (a *founder*).
        founders: the law over the founders alone, by place; they stand in for who is drawn too early.
        last: position at which everybody has joined.
    """

    joins: npt.NDArray[np.float64]
    founders: AliasTable
    last: float


@dataclass(frozen=True, slots=True)
class Joining:
    """Arrivals at some ratings.

    Attributes:
        arrivals: who joins when.
        positions: shape (n,), float64, of the ratings.
        spare: shape (n,), uint64, uniform: words that draw the founders.
    """

    arrivals: Arrivals
    positions: npt.NDArray[np.float64]
    spare: npt.NDArray[np.uint64]

    def at(self, rows: slice) -> Joining:
        """The same at some of the ratings."""
        return Joining(self.arrivals, self.positions[rows], self.spare[rows])

    def there(self, chosen: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether those chosen for some of the ratings, both of shape (k,), have joined by then."""
        return self.arrivals.joins.take(chosen) <= self.positions.take(rows)

    def founders(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """A founder for each of some ratings, shape (k,)."""
        return self.arrivals.founders.draw(self.spare.take(rows))

    def settled(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Those chosen, shape (n,), with a founder in place of each who is not there yet."""
        early = np.flatnonzero(self.arrivals.joins.take(chosen) > self.positions)
        chosen[early] = self.founders(early)
        return chosen


def arrivals(
    seed: int,
    name: str,
    ids: npt.NDArray[np.int64],
    weights: npt.NDArray[np.int64],
    share: float,
    until: int,
    always: npt.NDArray[np.bool_] | None = None,
) -> Arrivals:
    """Decide who joins when; each joins at a time that is uniform over the positions ``1 … until``.

    Args:
        seed: the run's.
        name: of the stream that decides.
        ids: shape (n,), int64, ascending, n ≥ 1.
        weights: shape (n,), int64: the law when all are there.
        share: of those who join later, 0 … 1.
        until: position at which the last has joined.
        always: shape (n,), those that are there from the beginning; None = nobody must be.
    """
    late, when = joining_words(seed, name, ids)
    joins = np.where(late < share, np.floor(when * until) + 1.0, 0.0)
    if always is not None:
        joins[always] = 0.0
    joins[np.argmax(late)] = 0.0  # somebody must be there
    return Arrivals(joins, AliasTable.from_weights(np.where(joins == 0, weights, 0)), float(joins.max()))


def joining_words(
    seed: int, name: str, ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Two uniform numbers an id, each of shape (n,), 0 … 1: below the share that joins later, it does; and when."""
    drawn = halfwords_of(seed, name, ids, 4).astype(np.float64)
    return (drawn[:, 0] * 65536.0 + drawn[:, 1]) / _UNIT, (drawn[:, 2] * 65536.0 + drawn[:, 3]) / _UNIT


def positions(first: int, count: int, share: float) -> npt.NDArray[np.float64]:
    """Position of each rating ``first … first + count - 1`` of a shard, shape (count,), float64."""
    return np.arange(first, first + count, dtype=np.float64) / share


def first_at(position: int, share: float) -> int:
    """Index of the first rating of a shard at a position or behind it."""
    index = max(0, int(position * share) - 1)
    while index / share < position:
        index += 1
    return index
