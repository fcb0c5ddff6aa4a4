"""Rate shapes: counts of ratings up to a time, and what may be made of them: pieces, sequences, sums, loops.

A shape is not a rate but its integral, in whole units of a hundred-thousandth of a rating at whole milliseconds. So what is
due up to a time is known at once, however far away that is, sums are exact, and no rounding piles up.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["NANO", "UNIT", "Constant", "Cut", "Loop", "Sequence", "Shape", "Sum", "Table", "Times"]

UNIT = 100_000
"""Units in a rating."""

NANO = 1_000_000_000
"""Rates are whole numbers of ratings per ``NANO`` seconds."""

_NANO_MS_PER_UNIT = NANO * 1000 // UNIT

Times = npt.NDArray[np.int64]
"""Milliseconds since the shape's own beginning, or units; int64, any shape."""


class Shape(Protocol):
    """A rate over time.

    Attributes:
        length_ms: how long it is, milliseconds; None = endless. Nothing is due after its end.
        peak: no rate in it is higher, per ``NANO`` seconds.
    """

    @property
    def length_ms(self) -> int | None: ...  # noqa: D102 - said above

    @property
    def peak(self) -> int: ...  # noqa: D102 - said above

    def upto(self, times: Times) -> Times:
        """Units due from the beginning up to each time (≥ 0), not decreasing with it."""
        ...

    def knots(self, from_ms: int, to_ms: int) -> Times:
        """The times in ``[from_ms, to_ms)`` at which the rate may change, in any order; between them it is constant."""
        ...

    def most_knots(self, span_ms: int) -> int:
        """No span of so many milliseconds has more knots."""
        ...


def total(shape: Shape) -> int:
    """Units that are due over all of a shape that ends."""
    assert shape.length_ms is not None
    return int(shape.upto(np.array([shape.length_ms], np.int64))[0])


class Constant:
    """The same rate for ever.

    Args:
        rate: per ``NANO`` seconds, ≥ 0.
    """

    length_ms: int | None = None

    def __init__(self, rate: int) -> None:
        self.peak = rate
        self._units_per_ms = rate / _NANO_MS_PER_UNIT

    def upto(self, times: Times) -> Times:
        """See :meth:`Shape.upto`."""
        return np.asarray(np.floor(times * self._units_per_ms), np.int64)

    def knots(self, from_ms: int, to_ms: int) -> Times:
        """None."""
        return np.empty(0, np.int64)

    def most_knots(self, span_ms: int) -> int:
        """None."""
        return 0


class Table:
    """A curve by its counts at some times; the rate is constant between them.

    Args:
        times_ms: shape (n,), n ≥ 2, ascending from 0.
        units: shape (n,), not decreasing from 0.
        peak: no rate in it is higher, per ``NANO`` seconds.
    """

    def __init__(self, times_ms: Several[int], units: Several[int], peak: int) -> None:
        self._times = np.array(times_ms, np.int64)
        self._units = np.maximum.accumulate(np.array(units, np.int64))
        self._steps = np.diff(self._units)
        self._spans = np.diff(self._times)
        self.length_ms: int | None = int(self._times[-1])
        self.peak = peak

    def upto(self, times: Times) -> Times:
        """See :meth:`Shape.upto`."""
        at = np.minimum(times, self._times[-1])
        piece = np.minimum(np.searchsorted(self._times, at, side="right") - 1, len(self._spans) - 1)
        share = (at - self._times[piece]) / self._spans[piece]
        step = np.floor(self._steps[piece] * share).astype(np.int64)
        return np.asarray(self._units[piece] + np.minimum(step, self._steps[piece]), np.int64)

    def knots(self, from_ms: int, to_ms: int) -> Times:
        """See :meth:`Shape.knots`."""
        first, last = np.searchsorted(self._times, [from_ms, to_ms])
        return self._times[first:last]

    def most_knots(self, span_ms: int) -> int:
        """See :meth:`Shape.most_knots`."""
        return len(self._times)


class Cut:
    """The first part of a shape, and nothing after it; a shorter one is followed by a pause.

    Args:
        shape: what is cut.
        length_ms: > 0.
    """

    def __init__(self, shape: Shape, length_ms: int) -> None:
        self._shape = shape
        self.length_ms: int | None = length_ms
        self._end = length_ms
        self.peak = shape.peak

    def upto(self, times: Times) -> Times:
        """See :meth:`Shape.upto`."""
        return self._shape.upto(np.minimum(times, self._end))

    def knots(self, from_ms: int, to_ms: int) -> Times:
        """See :meth:`Shape.knots`."""
        return _edges(self._shape.knots(from_ms, min(to_ms, self._end)), [self._end], from_ms, to_ms)

    def most_knots(self, span_ms: int) -> int:
        """See :meth:`Shape.most_knots`."""
        return self._shape.most_knots(span_ms) + 1


class Sequence:
    """Shapes one after the other; all but the last must end.

    Args:
        shapes: at least one.
    """

    def __init__(self, shapes: Several[Shape]) -> None:
        self._shapes = tuple(shapes)
        lengths = [shape.length_ms for shape in self._shapes[:-1]]
        assert all(length is not None for length in lengths)
        self._starts = [0, *accumulate(length or 0 for length in lengths)]
        last = self._shapes[-1].length_ms
        self.length_ms: int | None = None if last is None else self._starts[-1] + last
        self.peak = max(shape.peak for shape in self._shapes)

    @cached_property
    def _before(self) -> list[int]:
        return [0, *accumulate(total(shape) for shape in self._shapes[:-1])]

    def upto(self, times: Times) -> Times:
        """See :meth:`Shape.upto`."""
        which = np.searchsorted(self._starts, times, side="right") - 1
        found = np.empty(times.shape, np.int64)
        for n in np.unique(which).tolist():
            here = which == n
            found[here] = self._before[n] + self._shapes[n].upto(times[here] - self._starts[n])
        return found

    def knots(self, from_ms: int, to_ms: int) -> Times:
        """See :meth:`Shape.knots`."""
        parts = [np.empty(0, np.int64)]
        ends = [*self._starts[1:], to_ms]
        for shape, start, end in zip(self._shapes, self._starts, ends, strict=True):
            if start < to_ms and end >= from_ms:
                parts.append(shape.knots(max(0, from_ms - start), min(end, to_ms) - start) + start)
        return _edges(np.concatenate(parts), self._starts, from_ms, to_ms)

    def most_knots(self, span_ms: int) -> int:
        """See :meth:`Shape.most_knots`."""
        return sum(shape.most_knots(span_ms) + 1 for shape in self._shapes)


class Sum:
    """Shapes on top of each other; as long as the longest.

    Args:
        shapes: at least one.
    """

    def __init__(self, shapes: Several[Shape]) -> None:
        self._shapes = tuple(shapes)
        lengths = [shape.length_ms for shape in self._shapes]
        known = [length for length in lengths if length is not None]
        self.length_ms: int | None = max(known) if len(known) == len(lengths) else None
        self.peak = sum(shape.peak for shape in self._shapes)

    def upto(self, times: Times) -> Times:
        """See :meth:`Shape.upto`."""
        found = self._shapes[0].upto(times)
        for shape in self._shapes[1:]:
            found = found + shape.upto(times)
        return found

    def knots(self, from_ms: int, to_ms: int) -> Times:
        """See :meth:`Shape.knots`."""
        return np.concatenate([shape.knots(from_ms, to_ms) for shape in self._shapes])

    def most_knots(self, span_ms: int) -> int:
        """See :meth:`Shape.most_knots`."""
        return sum(shape.most_knots(span_ms) for shape in self._shapes)


class Loop:
    """A shape that ends, again and again.

    Args:
        shape: what is repeated.
        times: how often; None = for ever.
    """

    def __init__(self, shape: Shape, times: int | None = None) -> None:
        assert shape.length_ms is not None
        self._shape = shape
        self._period = shape.length_ms
        self._times = times
        self.length_ms: int | None = None if times is None else times * shape.length_ms
        self.peak = shape.peak

    @cached_property
    def _total(self) -> int:
        return total(self._shape)

    def upto(self, times: Times) -> Times:
        """See :meth:`Shape.upto`."""
        at = times if self.length_ms is None else np.minimum(times, self.length_ms)
        rounds, rest = np.divmod(at, self._period)
        return np.asarray(rounds * self._total + self._shape.upto(rest), np.int64)

    def knots(self, from_ms: int, to_ms: int) -> Times:
        """See :meth:`Shape.knots`."""
        end = to_ms if self.length_ms is None else min(to_ms, self.length_ms)
        rounds = range(from_ms // self._period, max(0, -(-end // self._period)))
        starts = [n * self._period for n in rounds]
        parts = [self._shape.knots(max(0, from_ms - start), min(end - start, self._period)) + start for start in starts]
        edges = starts if self.length_ms is None else [*starts, self.length_ms]
        return _edges(np.concatenate([np.empty(0, np.int64), *parts]), edges, from_ms, to_ms)

    def most_knots(self, span_ms: int) -> int:
        """See :meth:`Shape.most_knots`."""
        return (span_ms // self._period + 2) * (self._shape.most_knots(min(span_ms, self._period)) + 1)


def _edges(knots: Times, edges: Several[int], from_ms: int, to_ms: int) -> Times:
    inside = [edge for edge in edges if from_ms <= edge < to_ms]
    return np.concatenate([knots, np.array(inside, np.int64)])
