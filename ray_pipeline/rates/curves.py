"""The curved shapes as tables: exact counts at up to a thousand times, a constant rate in between.

All of it is whole-number arithmetic, the cosine too, so that every machine finds the same counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from ray_pipeline.rates.shapes import NANO, UNIT, Table

__all__ = ["ramp", "sine", "spike"]

_CELLS = 1024
_ONE = 1 << 96
_TWO_PI = (int(math.pi * 2**50) << 46) * 2  # scaled by _ONE
_PER_UNIT = NANO * 1000 // UNIT


@lru_cache(maxsize=64)
def ramp(first: int, last: int, length_ms: int) -> Table:
    """From one rate to another in a straight line.

    Args:
        first: per ``NANO`` seconds.
        last: per ``NANO`` seconds.
        length_ms: > 0.
    """

    def upto(at: int) -> int:
        return (2 * first * length_ms * at + (last - first) * at * at) // (2 * length_ms * _PER_UNIT)

    return _table(upto, length_ms, max(first, last))


@lru_cache(maxsize=64)
def sine(mean: int, amplitude: int, period_ms: int, phase_ms: int) -> Table:
    """One period of ``mean + amplitude · sin(2π (t + phase) / period)``.

    Args:
        mean: per ``NANO`` seconds.
        amplitude: per ``NANO`` seconds, ≤ ``mean``.
        period_ms: > 0.
        phase_ms: how far into the wave it begins.
    """
    begin = _cosine(phase_ms, period_ms)

    def upto(at: int) -> int:
        swing = amplitude * period_ms * (begin - _cosine(at + phase_ms, period_ms))
        return (mean * at * _TWO_PI + swing) // (_PER_UNIT * _TWO_PI)

    return _table(upto, period_ms, mean + amplitude)


@lru_cache(maxsize=64)
def spike(peak: int, rise_ms: int, hold_ms: int, fall_ms: int) -> Table:
    """Up to ``peak``, along it, and down again; up and down as u² (3 − 2 u), which begins and ends without a kink.

    Args:
        peak: per ``NANO`` seconds.
        rise_ms: ≥ 0.
        hold_ms: ≥ 0.
        fall_ms: ≥ 0.
    """
    length_ms = rise_ms + hold_ms + fall_ms

    def eased(at: int, span: int) -> int:
        """Twice the integral of the ease from 0 to ``at``, times span³: ``at`` ≤ span."""
        return 2 * at**3 * span - at**4

    def upto(at: int) -> int:
        up, flat = min(at, rise_ms), min(max(0, at - rise_ms), hold_ms)
        down = max(0, at - rise_ms - hold_ms)
        found = 2 * peak * flat
        if up:
            found += peak * eased(up, rise_ms) // rise_ms**3
        if down:
            found += peak * (fall_ms**4 - eased(fall_ms - down, fall_ms)) // fall_ms**3
        return found // (2 * _PER_UNIT)

    return _table(upto, length_ms, peak, (rise_ms, rise_ms + hold_ms))


def _table(upto: Callable[[int], int], length_ms: int, peak: int, edges: tuple[int, ...] = ()) -> Table:
    cells = min(_CELLS, length_ms)
    times = sorted({*(k * length_ms // cells for k in range(cells + 1)), *edges})
    return Table(times, [upto(at) for at in times], peak)


def _cosine(numerator: int, denominator: int) -> int:
    """cos(2π numerator / denominator), scaled by ``_ONE``: its Taylor series in whole numbers."""
    turn = numerator % denominator
    turn = min(turn, denominator - turn)
    angle = turn * _TWO_PI // denominator
    square = angle * angle // _ONE
    term, found, n = _ONE, _ONE, 0
    while term:
        n += 2
        term = term * square // (_ONE * n * (n - 1))
        found += term if n % 4 == 0 else -term
    return found
