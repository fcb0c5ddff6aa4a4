"""The longest row of values that rise: what is in order, by as few exceptions as possible."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

__all__ = ["longest_rise"]


def longest_rise(values: Sequence[int], *, strictly: bool) -> list[int]:
    """Positions of a longest row of values each of which is greater than the one before it, or not less; ascending.

    Patience sorting, n log n steps (M. Fredman, "On computing the length of longest increasing subsequences", 1975).
    """
    place_of = bisect_left if strictly else bisect_right
    ends: list[int] = []  # the least value that a row of each length can end with
    ends_at: list[int] = []
    before: list[int] = []
    for at, value in enumerate(values):
        place = place_of(ends, value)
        before.append(ends_at[place - 1] if place else -1)
        ends[place : place + 1] = [value]
        ends_at[place : place + 1] = [at]
    found = []
    at = ends_at[-1] if ends_at else -1
    while at >= 0:
        found.append(at)
        at = before[at]
    return found[::-1]
