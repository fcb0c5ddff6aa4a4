"""The rate plan: the cumulative number of ratings due by an event time, and its inverse.

The plan is Λ(t), piecewise linear over epochs of constant rate or of a shape, the same for all shards. Shard p, with share s of
all ratings, has its rating n due when Λ(t) = a(n) / s, where a(n) = n + φ for regular arrivals with phase φ, and the n-th point
of a Poisson process of rate 1 for random ones. So event times do not depend on who sends, or when.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.generator.arrivals import Arrivals, PoissonArrivals, RegularArrivals, poisson_arrivals
from ray_pipeline.rates.curve import NEVER_MS, Curve
from ray_pipeline.rates.language import curve_of
from ray_pipeline.rates.shapes import UNIT

__all__ = ["NEVER_MS", "RatePlan", "ShardSchedule", "allocate"]

_FAR_MS = 2.0**52


@dataclass(frozen=True, slots=True)
class _Shaped:
    """An epoch of which a shape says the rate."""

    curve: Curve
    zero_ms: int
    base: int  # units of the shape that were due before the epoch

    @classmethod
    def of(cls, epoch: Epoch) -> _Shaped:
        assert epoch.plan is not None
        curve = curve_of(epoch.plan, epoch.zero_ms)
        return cls(curve, epoch.zero_ms, curve.upto(epoch.from_ms - epoch.zero_ms))

    def due(self, at_ms: float) -> float:
        """Ratings from the epoch's beginning up to an event time."""
        return (self.curve.upto(math.floor(at_ms) - self.zero_ms) - self.base) / UNIT

    def time_of(self, due: npt.NDArray[np.float64], from_ms: int, to_ms: int) -> npt.NDArray[np.int64]:
        """The inverse, within the epoch."""
        past_ms = self.curve.time_of(due * UNIT + self.base)
        at_ms = np.clip(past_ms + self.zero_ms, from_ms, to_ms)
        # what lies beyond the last epoch's end is never reached; beyond another's it is rounding
        return np.where((past_ms == NEVER_MS) & (to_ms == NEVER_MS), NEVER_MS, at_ms)


class RatePlan:
    """Epochs of constant rate, or of a shape.

    Args:
        epochs: at least one, ``from_ms`` strictly ascending, rates ≥ 0. Before the first one nothing is due.

    Raises:
        ValueError: they are not in order, or (as :class:`PlanError`) the text of a plan is malformed.
    """

    def __init__(self, epochs: Iterable[Epoch]) -> None:
        self.epochs = tuple(epochs)
        starts = [epoch.from_ms for epoch in self.epochs]
        if not starts or any(b <= a for a, b in pairwise(starts)):
            msg = "a plan needs at least one epoch, in ascending order of time"
            raise ValueError(msg)
        self._shaped = {n: _Shaped.of(epoch) for n, epoch in enumerate(self.epochs) if epoch.plan is not None}
        cumulative = [0.0]
        for n, (now, following) in enumerate(pairwise(self.epochs)):
            cumulative.append(cumulative[-1] + self._due(n, now, following.from_ms))
        self._cumulative = cumulative
        self._cumulative_array = np.array(cumulative)
        self._starts = np.array(starts, np.int64)
        self._rates = np.array([epoch.rate for epoch in self.epochs])

    def epoch_at(self, at_ms: int) -> Epoch:
        """The epoch in force at an event time; before the first one a pause."""
        position = int(np.searchsorted(self._starts, at_ms, side="right")) - 1
        return self.epochs[position] if position >= 0 else Epoch(at_ms, 0.0)

    def rate_at(self, at_ms: int) -> float:
        """Rate in force at an event time, ratings per second over all shards; 0 = paused."""
        position = int(np.searchsorted(self._starts, at_ms, side="right")) - 1
        if position in self._shaped:
            shaped = self._shaped[position]
            return shaped.curve.rate_at(at_ms - shaped.zero_ms)
        return self.epochs[position].rate if position >= 0 else 0.0

    def expected(self, at_ms: float) -> float:
        """Λ: ratings due up to ``at_ms`` (epoch milliseconds), over all shards."""
        position = int(np.searchsorted(self._starts, at_ms, side="right")) - 1
        if position < 0:
            return 0.0
        return self._cumulative[position] + self._due(position, self.epochs[position], at_ms)

    def total(self) -> float:
        """Ratings that are ever due; infinite where the last epoch has no end."""
        last = len(self.epochs) - 1
        if last not in self._shaped:
            return math.inf if self.epochs[last].rate > 0 else self._cumulative[last]
        shaped = self._shaped[last]
        return self._cumulative[last] + (shaped.curve.total() - shaped.base) / UNIT

    def time_of(self, expected: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The inverse of Λ: first epoch millisecond, rounded down, at which it reaches each value.

        Args:
            expected: shape (n,), float64, > 0.

        Returns:
            Shape (n,), int64; :data:`NEVER_MS` where the plan ends below the value.
        """
        position = np.searchsorted(self._cumulative_array, expected, side="left") - 1
        position = np.maximum(position, 0)
        rate = self._rates[position]
        with np.errstate(over="ignore"):  # a rate next to nothing reaches a value at no time that can be told
            past_ms = np.floor((expected - self._cumulative_array[position]) / np.where(rate > 0, rate, 1.0) * 1000.0)
        reached = (rate > 0) & (past_ms < _FAR_MS)
        at_ms = self._starts[position] + np.where(reached, past_ms, 0.0).astype(np.int64)
        found = np.where(reached, at_ms, NEVER_MS)
        for n, shaped in self._shaped.items():
            here = position == n
            if here.any():
                to_ms = self.epochs[n + 1].from_ms if n + 1 < len(self.epochs) else NEVER_MS
                due = expected[here] - self._cumulative[n]
                found[here] = shaped.time_of(due, self.epochs[n].from_ms, to_ms)
        return found

    def with_epoch(self, epoch: Epoch) -> RatePlan:
        """The plan, going on with another rate from ``epoch.from_ms`` on (later epochs are replaced)."""
        return RatePlan([*(e for e in self.epochs if e.from_ms < epoch.from_ms), epoch])

    def with_past(self, lived: RatePlan, through_ms: int) -> RatePlan:
        """The plan that is as ``lived`` up to and including ``through_ms``, and as this one after it."""
        past = [e for e in lived.epochs if e.from_ms <= through_ms]
        then_ms = through_ms + 1
        then = self.epoch_at(then_ms)
        if not past or not past[-1].same_rates(then):
            past.append(replace(then, from_ms=then_ms))
        return RatePlan([*past, *(e for e in self.epochs if e.from_ms > then_ms)])

    def _due(self, position: int, epoch: Epoch, at_ms: float) -> float:
        """Ratings from an epoch's beginning up to an event time."""
        if position in self._shaped:
            return self._shaped[position].due(at_ms)
        return epoch.rate * ((at_ms - epoch.from_ms) / 1000.0)


@dataclass(frozen=True, slots=True)
class ShardSchedule:
    """When the ratings of one shard are due.

    Attributes:
        plan: the rate plan.
        share: the shard's share of all ratings, 0 < share ≤ 1.
        phase: 0 < phase < 1; sets the shards apart so that they do not fire together.
        poisson: random arrivals; None = regular ones.
    """

    plan: RatePlan
    share: float
    phase: float
    poisson: PoissonArrivals | None = None

    @classmethod
    def lived(cls, progress: ShardProgress) -> ShardSchedule:
        """As a shard lived it, by its progress record.

        Raises:
            ValueError: see :class:`RatePlan`.
        """
        poisson = poisson_arrivals(progress.poisson_seed, progress.partition)
        return cls(RatePlan(progress.epochs), progress.share, progress.phase, poisson)

    @property
    def arrivals(self) -> Arrivals:
        """How its ratings follow each other."""
        return self.poisson or RegularArrivals(self.phase)

    def due_ms(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Event time of ratings ``first … first + count - 1``, epoch milliseconds, not decreasing."""
        return self.plan.time_of(self.arrivals.points(first, count) / self.share)

    def count_due(self, at_ms: float) -> int:
        """How many ratings are due up to ``at_ms``, that is the index of the next one."""
        return self.arrivals.count_upto(self.plan.expected(at_ms) * self.share)

    def going_on(self, plan: RatePlan, taken: int) -> ShardSchedule:
        """The schedule that leaves the times of ratings ``0 … taken - 1`` as they are, and goes on as ``plan`` says."""
        if taken == 0:
            return replace(self, plan=plan)
        last_ms = through_ms = int(self.due_ms(taken - 1, 1)[0])
        while True:
            found = replace(self, plan=plan.with_past(self.plan, through_ms))
            if int(found.due_ms(taken - 1, 1)[0]) == last_ms:
                return found
            through_ms += 1  # due so late in its millisecond that rounding would put it into the next one

    def count_before(self, times_ms: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
        """How many ratings have an event time before each time, to the millisecond, as :meth:`due_ms` has it.

        Args:
            times_ms: shape (n,), int64, epoch milliseconds, in any order.
            most: no more are looked at.

        Returns:
            Shape (n,), int64, 0 … ``most``.
        """
        if not len(times_ms):
            return np.empty(0, np.int64)
        # bisection on the times themselves: counting and its inverse may differ by one on a millisecond's edge
        low = np.full(len(times_ms), max(0, min(self.count_due(int(times_ms.min()) - 1) - 2, most)), np.int64)
        high = np.full(len(times_ms), max(0, min(self.count_due(int(times_ms.max()) + 1) + 2, most)), np.int64)
        while (low < high).any():
            middle = (low + high) // 2
            due_ms = self.plan.time_of(self.arrivals.points_at(middle) / self.share)
            early = (due_ms < times_ms) & (low < high)
            low = np.where(early, middle + 1, low)
            high = np.where(early, high, middle)
        return low


def allocate(schedules: list[ShardSchedule], starts: list[int], total: int) -> list[int]:
    """Share out the next ``total`` ratings: those that are due first, whatever the rate.

    Args:
        schedules: of each shard; only share and arrivals are used.
        starts: next index of each shard.
        total: how many ratings over all shards, ≥ 0.

    Returns:
        End index (exclusive) of each shard; ``sum(ends) - sum(starts) == total``.
    """
    if not schedules:
        return []
    # all but a few ratings a shard can be counted at once; the last few are taken one by one in order
    done = sum(starts)
    spread = 2 * len(schedules) + sum(s.arrivals.spread(done + total) for s in schedules)
    safe = max(0.0, float(done + total - spread))
    ends = [max(start, s.arrivals.count_upto(safe * s.share)) for s, start in zip(schedules, starts, strict=True)]
    left = done + total - sum(ends)
    if left < 0:  # starts are far from the shares: count from the starts alone
        ends = list(starts)
        left = total
    queue = [(s.arrivals.point(end) / s.share, p) for p, (s, end) in enumerate(zip(schedules, ends, strict=True))]
    heapify(queue)
    for _ in range(left):
        _, p = queue[0]
        ends[p] += 1
        heapreplace(queue, (schedules[p].arrivals.point(ends[p]) / schedules[p].share, p))
    return ends
