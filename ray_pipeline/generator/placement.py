"""Which actor has which partition, and how a partition passes from one to another. Pure: no Ray, Kafka or clock."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["HAND_OVER_MS", "Placement"]

HAND_OVER_MS = 5_000
"""How long an actor may take to commit and let go of a partition before the next one takes it, which fences the first."""


@dataclass(frozen=True, slots=True)
class _Passing:
    old: int
    new: int
    until_ms: int


class Placement:
    """Spreads the partitions over actors 0 … n - 1, and over another number of them later.

    Invariant: at any time at most one actor is told that a partition is its own.

    Args:
        partitions: how many there are.
        actors: how many there are, 1 … partitions.
    """

    def __init__(self, partitions: int, actors: int) -> None:
        self._owner = {p: p % actors for p in range(partitions)}
        self._passing: dict[int, _Passing] = {}
        self._lent_ms: int | None = None
        self._held: set[int] = set()

    @property
    def lent(self) -> bool:
        """Whether no actor has anything, because somebody else is to have it all; not before all have let go."""
        return self._lent_ms is not None and not self._held

    @property
    def settled(self) -> bool:
        """Whether no partition is passing from one actor to another."""
        return not self._passing

    def of(self, actor: int) -> list[int]:
        """The partitions that an actor has, ascending; one that passes on is nobody's."""
        if self._lent_ms is not None:
            return []
        return [p for p, owner in self._owner.items() if owner == actor and p not in self._passing]

    def spread(self, actors: int, now_ms: int) -> None:
        """Pass partitions on so that ``actors`` actors have them all; only when settled."""
        for partition, owner in self._owner.items():
            if owner != partition % actors:
                self._passing[partition] = _Passing(owner, partition % actors, now_ms + HAND_OVER_MS)

    def lend(self, now_ms: int) -> None:
        """Have all actors let go of all partitions; only when settled."""
        self._lent_ms, self._held = now_ms, set(self._owner)

    def take_back(self) -> None:
        """Give the actors their partitions again."""
        self._lent_ms = None
        self._held.clear()

    def heard(self, actor: int, having: Collection[int]) -> None:
        """Note which partitions an actor still has: those that it has let go of are passed on."""
        self._held -= {p for p in self._held if self._owner[p] == actor and p not in having}
        gone = [p for p, passing in self._passing.items() if passing.old == actor and p not in having]
        for partition in gone:
            self._owner[partition] = self._passing.pop(partition).new

    def expire(self, now_ms: int) -> dict[int, int]:
        """Pass on what was not let go of in time.

        Returns:
            The partitions, each with the actor that did not let go.
        """
        late = {p: passing.old for p, passing in self._passing.items() if now_ms >= passing.until_ms}
        for partition in late:
            self._owner[partition] = self._passing.pop(partition).new
        if self._lent_ms is not None and now_ms - self._lent_ms >= HAND_OVER_MS:
            late |= {p: self._owner[p] for p in self._held}
            self._held.clear()
        return late
