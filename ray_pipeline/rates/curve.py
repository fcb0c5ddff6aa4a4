"""A shape as a schedule asks it: counts up to a time, and the time of any count, from anywhere, millions a second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ray_pipeline.rates.shapes import NANO, UNIT, Shape, Times

__all__ = ["NEVER_MS", "Curve"]

NEVER_MS = 2**62
"""The time of a count that is never reached."""

_MOST_UNITS = 2**62
_MOST_MS = 200 * 366 * 86_400_000
_LEAST_BLOCK_MS = 1_000
_MOST_BLOCK_MS = 1 << 27
_MOST_KNOTS = 4_096
_BLOCKS_KEPT = 64
_PROBES = 64
_NANO_PER_UNIT_MS = NANO * 1000 // UNIT


@dataclass(frozen=True, slots=True)
class _Block:
    """A stretch of the curve: counts at its knots, in between a straight line.

    Attributes:
        times: shape (n,), int64, milliseconds, strictly ascending.
        units: shape (n,), float64, whole, not decreasing.
        ms_per_unit: shape (n - 1,), float64; 0 where nothing is due.
    """

    times: Times
    units: npt.NDArray[np.float64]
    ms_per_unit: npt.NDArray[np.float64]

    def invert(self, units: npt.NDArray[np.float64]) -> Times:
        """First millisecond, rounded down, at which the count reaches each of ``units``, which must lie in the block."""
        piece = np.clip(np.searchsorted(self.units, units, side="left") - 1, 0, len(self.ms_per_unit) - 1)
        past = np.floor((units - self.units[piece]) * self.ms_per_unit[piece]).astype(np.int64)
        return np.asarray(self.times[piece] + np.clip(past, 0, np.diff(self.times)[piece]), np.int64)


class Curve:
    """Counts of a shape and their inverse. Remembers the stretches that were asked for last, no more; any thread may ask.

    It ends where its shape does; one of the highest possible rates after 53 days, one of 100,000 a second after 14 years.

    Args:
        shape: what is due.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        length = _MOST_MS if shape.length_ms is None else shape.length_ms
        self._end_ms = max(1, min(length, _MOST_UNITS * _NANO_PER_UNIT_MS // max(shape.peak, 1)))
        block_ms = _LEAST_BLOCK_MS
        while block_ms * 2 <= _MOST_BLOCK_MS and shape.most_knots(block_ms * 2) <= _MOST_KNOTS:
            block_ms *= 2
        self._block_ms = block_ms
        self._block = lru_cache(_BLOCKS_KEPT)(self._make_block)
        self._last = 0

    @property
    def endless(self) -> bool:
        """Whether the shape has no end."""
        return self._shape.length_ms is None

    def over_at(self, at_ms: int) -> bool:
        """Whether nothing is due after a time, because the shape has ended by then."""
        return not self.endless and at_ms >= self._end_ms

    def upto(self, at_ms: int) -> int:
        """Units due up to a time (milliseconds since the beginning; before it there are none)."""
        return int(self._counts(np.array([max(0, at_ms)], np.int64))[0])

    def span_ms(self, ratings: int) -> int | None:
        """Milliseconds from the beginning until so many ratings are due; None where they never are."""
        found = int(self.time_of(np.array([float(ratings) * UNIT]))[0])
        return None if found == NEVER_MS else found + 1

    def total(self) -> float:
        """Units due over all of it; infinite where it does not end."""
        return float("inf") if self.endless else float(self.upto(self._end_ms))

    def rate_at(self, at_ms: int) -> float:
        """Ratings per second at a time, as the curve has it."""
        if not 0 <= at_ms < self._end_ms:
            return 0.0
        block = self._block(at_ms // self._block_ms)
        piece = min(int(np.searchsorted(block.times, at_ms, side="right")) - 1, len(block.ms_per_unit) - 1)
        span = block.times[piece + 1] - block.times[piece]
        return float((block.units[piece + 1] - block.units[piece]) / span * (1000 / UNIT))

    def time_of(self, units: npt.NDArray[np.float64]) -> Times:
        """The inverse of the count.

        Args:
            units: shape (n,), float64, > 0, in any order.

        Returns:
            Shape (n,), int64, milliseconds since the beginning, rounded down; :data:`NEVER_MS` where it is never reached.
        """
        if len(units) > 1 and (np.diff(units) < 0).any():
            order = np.argsort(units, kind="stable")
            found = np.empty(len(units), np.int64)
            found[order] = self._time_of_ascending(units[order])
            return found
        return self._time_of_ascending(units)

    # -- inside

    def _time_of_ascending(self, units: npt.NDArray[np.float64]) -> Times:
        found = np.full(len(units), NEVER_MS, np.int64)
        done = 0
        while done < len(units):
            n = self._locate(float(units[done]))
            if n is None:
                break
            block = self._block(n)
            until = done + int(np.searchsorted(units[done:], block.units[-1], side="right"))
            found[done:until] = block.invert(units[done:until])
            done = until
            self._last = n
        return found

    def _locate(self, units: float) -> int | None:
        """The first block at whose end so many units are due; None when there is none."""
        low, end = self._last, -(-self._end_ms // self._block_ms)
        if low and float(self._block(low).units[0]) >= units:
            low = 0
        step, high = 1, low + 1
        while (
            self._due_after(high - 1) < units
        ):  # ahead in strides that double, so that the far future is not looked at
            if high >= end:
                return None
            low, high, step = high, min(high + step, end), step * 2
        while high - low > 1:
            probes = np.unique(np.linspace(low, high - 1, _PROBES).astype(np.int64))
            reached = int(np.searchsorted(self._counts((probes + 1) * self._block_ms), units, side="left"))
            low = int(probes[reached - 1]) + 1 if reached else low
            high = int(probes[reached]) + 1
        return low

    def _due_after(self, block: int) -> float:
        return float(self.upto((block + 1) * self._block_ms))

    def _counts(self, times: Times) -> Times:
        return self._shape.upto(np.minimum(times, self._end_ms))

    def _make_block(self, n: int) -> _Block:
        first, last = n * self._block_ms, (n + 1) * self._block_ms
        knots = self._shape.knots(first, last)
        times = np.unique(np.concatenate([knots, np.array([first, last], np.int64)]))
        units = self._counts(times).astype(np.float64)
        steps = np.diff(units)
        return _Block(times, units, np.where(steps > 0, np.diff(times) / np.where(steps > 0, steps, 1.0), 0.0))
