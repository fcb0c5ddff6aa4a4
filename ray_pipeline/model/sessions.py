"""Sessions: a user rates several movies in a row, while others do the same beside.

A shard's ratings are dealt round to a few *lanes*; in a lane one session follows another. A rating begins a session by a coin
of its own, and always at every ``span``-th place of the lane, so who rates at an index follows from at most ``LANES · span``
indexes before it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["LANES", "Sessions"]

LANES = 8
"""How many sessions of a shard run side by side."""

_COIN_SHIFT = np.uint64(32)


class Sessions:
    """Where the session of each rating began.

    Args:
        length: mean number of ratings in a session, ≥ 1; exact, also with the places at which one always begins.
    """

    def __init__(self, length: float) -> None:
        self._span = 1 << max(3, (4 * int(np.ceil(length)) - 1).bit_length())
        # a span has 1 + (span - 1)·p sessions on average; they shall be span / length
        chance = (self._span / length - 1) / (self._span - 1)
        self._threshold = np.uint64(round(chance * 2.0**32))

    def lookback(self, first: int) -> int:
        """Index from which on the coins must be known to know all sessions from ``first`` on."""
        return max(0, first - LANES * self._span)

    def begins(self, lo: int, first: int, word: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Where the session of each rating from ``first`` on began.

        Args:
            lo: index of the first word, :meth:`lookback` of ``first``.
            first: index of the first rating that is asked for.
            word: shape (n,), uint64, uniform: the high half of each rating's word is its coin.

        Returns:
            Shape (n - (first - lo),), int64: places in ``word``.
        """
        lead = lo % LANES
        index = np.arange(lo - lead, lo + len(word), dtype=np.int64)
        lane, place = index % LANES, index // LANES
        # lanes do not all change their user at once
        begins = (place + lane * (self._span // LANES)) % self._span == 0
        begins |= place == 0
        begins[lead:] |= (word >> _COIN_SHIFT) < self._threshold
        begins[:lead] = False  # places before lo are of no session that is asked for
        rows = -(-len(index) // LANES)
        found = np.full(rows * LANES, -1, np.int64)
        found[: len(index)] = np.where(begins, np.arange(len(index)) - lead, -1)
        found = np.maximum.accumulate(found.reshape(rows, LANES), axis=0).reshape(-1)
        return found[lead + first - lo : len(index)]
