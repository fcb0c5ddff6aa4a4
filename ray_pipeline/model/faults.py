"""What is wrong with each record of a shard, on purpose: a pure function of (seed, settings, partition, index).

One 64-bit word an index says it all: its low half which fault a record has, if any, its high half how (by how much, which record
it repeats, where it is cut off). No record is added or taken away, so the n-th record of a partition is record n.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import FAULT_SHARES, Settings
from ray_pipeline.events import Fault
from ray_pipeline.model.streams import WORDS_PER_COUNTER, words
from ray_pipeline.spans import Silence, parse_clock_skew, parse_silent

__all__ = ["BROKEN", "Fates", "Faults", "make_faults"]

Times = npt.NDArray[np.int64]
Due = Callable[[int, int], Times]
"""(first, count) → the times at which these records are due, epoch milliseconds."""

BROKEN = int(Fault.MALFORMED)
"""Faults from here on leave no valid rating."""

_ONE = 1 << 32
_LOW = np.uint64(_ONE - 1)
_HIGH = np.uint64(32)
_LAW_ENTRIES = 1 << 16
_RARE = math.log(2_000_000)
_NONE = 1e-12  # what sums of shares are off by
_REPEATABLE = np.isin(np.arange(len(Fault)), [Fault.NONE, Fault.LATE, Fault.OUT_OF_ORDER])
_FAULT_OF = {
    "late_share": Fault.LATE,
    "disorder_share": Fault.OUT_OF_ORDER,
    "duplicate_share": Fault.DUPLICATE,
    "future_share": Fault.FUTURE,
    "unknown_field_share": Fault.UNKNOWN_FIELD,
    "malformed_share": Fault.MALFORMED,
    "missing_field_share": Fault.MISSING_FIELD,
    "out_of_range_share": Fault.OUT_OF_RANGE,
    "tombstone_share": Fault.TOMBSTONE,
}


@dataclass(frozen=True, slots=True)
class Fates:
    """What becomes of some consecutive records of a shard.

    Attributes:
        first: index of the first record.
        faults: shape (n,), uint8, a :class:`Fault` each.
        details: shape (n,), uint32: which of many ways.
        sources: shape (n,), int64: the record whose rating and time each one has: its own index, but for duplicates.
        due_ms: shape (n,), int64, when each is due, epoch milliseconds.
        times_ms: shape (n,), int64, the event time that each one names, epoch milliseconds.
    """

    first: int
    faults: npt.NDArray[np.uint8]
    details: npt.NDArray[np.uint32]
    sources: Times
    due_ms: Times
    times_ms: Times


def make_faults(settings: Settings, partition: int) -> Faults | None:
    """The faults of a shard; None when nothing is broken on purpose."""
    spoilt = any(getattr(settings, name) for name in (*FAULT_SHARES, "drop_share", "clock_skew", "silent"))
    return Faults(settings, partition) if spoilt else None


class Faults:
    """The faults of one shard.

    Args:
        settings: the event settings are used.
        partition: the shard.

    Attributes:
        partition: the shard.
        skew_ms: by how much its clock is wrong, milliseconds.
        future_ms: by how much records with a future time are ahead, milliseconds.
        behind_ms: by how much late records and those out of order are behind at most, milliseconds.
        reach: in how many records behind a record its repeats lie, but for one in a million of them.
    """

    def __init__(self, settings: Settings, partition: int) -> None:
        self.partition = partition
        self.skew_ms = parse_clock_skew(settings.clock_skew).get(partition, 0)
        self.future_ms = round(settings.future_s * 1000) if settings.future_share else 0
        self._silence: Silence | None = parse_silent(settings.silent).get(partition)
        self._seed = settings.seed
        order = [name for name in FAULT_SHARES if getattr(settings, name)]
        bounds = np.cumsum([getattr(settings, name) for name in order]) if order else np.zeros(0)
        self._bounds = np.floor(bounds * _ONE).astype(np.uint64)
        self._order = np.array([_FAULT_OF[name] for name in order], np.uint8)
        self._distance = np.uint64(settings.duplicate_distance)
        self._late_ms = lateness_table(settings.late_law, settings.late_mean_s, settings.late_max_s)
        self._disorder_ms = np.uint64(max(1, round(settings.disorder_s * 1000)))
        self._drop_below = np.uint64(math.floor(settings.drop_share * _ONE))
        late_ms = int(self._late_ms.max()) if settings.late_share else 0
        self.behind_ms = max(late_ms, int(self._disorder_ms) if settings.disorder_share else 0)
        self.reach = _reach(settings) if settings.duplicate_share else 0

    # -- records

    def kinds(self, first: int, count: int) -> npt.NDArray[np.uint8]:
        """Which fault records ``first … first + count - 1`` have, shape (count,), uint8; repeats of nothing are still among them."""
        return self._kinds(self._words("faults", first, count))

    def fates(self, first: int, count: int, due: Due) -> Fates:
        """What becomes of records ``first … first + count - 1``.

        Args:
            first: index of the first record, ≥ 0.
            count: how many, ≥ 0.
            due: has their times.
        """
        drawn = self._words("faults", first, count)
        faults = self._kinds(drawn)
        due_ms = due(first, count)
        times_ms = due_ms + self._shifts(faults, drawn)
        sources = np.arange(first, first + count)
        repeats = np.flatnonzero(faults == Fault.DUPLICATE)
        if len(repeats):
            found = self._sources(first, drawn, repeats)
            faults[repeats[found < 0]] = Fault.NONE  # there is nothing yet that it could repeat
            repeats, found = repeats[found >= 0], found[found >= 0]
            if len(found):
                sources[repeats] = found
                times_ms[repeats] = self._times_of(found, due)
        details = (drawn >> _HIGH).astype(np.uint32)
        return Fates(first, faults, details, sources, due_ms, np.maximum(times_ms, 1))

    def rejects(self, guard_ms: int) -> npt.NDArray[np.bool_]:
        """Which faults make a job reject a record, shape (faults,), by :class:`Fault`.

        Args:
            guard_ms: how far ahead of its sending a rating's event time may lie, milliseconds; 0 = as far as it likes.
        """
        found = np.arange(len(Fault)) >= BROKEN
        found[Fault.FUTURE] = 0 < guard_ms < self.skew_ms + self.future_ms
        return found

    def dropped(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Beside which of records ``first … first + count - 1`` a rating is lost: indexes, ascending."""
        if not self._drop_below:
            return np.empty(0, np.int64)
        return first + np.flatnonzero((self._words("drops", first, count) & _LOW) < self._drop_below)

    # -- silence

    def silent_since(self, at_ms: int) -> int | None:
        """When the silence began that is at an event time, epoch milliseconds; None when there is none."""
        if self._silence is None or at_ms % self._silence.every_ms >= self._silence.for_ms:
            return None
        return at_ms - at_ms % self._silence.every_ms

    def sent_ms(self, due_ms: Times) -> Times:
        """When ratings that are due at some times may be sent: at once, but for a silence, shape (n,), epoch milliseconds."""
        if self._silence is None:
            return due_ms
        into = due_ms % self._silence.every_ms
        return np.where(into < self._silence.for_ms, due_ms - into + self._silence.for_ms, due_ms)

    # -- inside

    def _words(self, name: str, first: int, count: int) -> npt.NDArray[np.uint64]:
        """One word an index."""
        counter = first // WORDS_PER_COUNTER
        counters = -(-(first + count) // WORDS_PER_COUNTER) - counter
        drawn = words(self._seed, name, self.partition, counter, counters).reshape(-1)
        start = first - counter * WORDS_PER_COUNTER
        return drawn[start : start + count]

    def _kinds(self, drawn: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        found = np.zeros(len(drawn), np.uint8)
        if len(self._order):
            low = drawn & _LOW
            hit = np.flatnonzero(low < self._bounds[-1])
            found[hit] = self._order[np.searchsorted(self._bounds, low[hit], "right")]
        return found

    def _shifts(self, faults: npt.NDArray[np.uint8], drawn: npt.NDArray[np.uint64]) -> Times:
        """Event time less due time, milliseconds."""
        shifts = np.full(len(drawn), self.skew_ms, np.int64)
        high = drawn >> _HIGH
        late, back = faults == Fault.LATE, faults == Fault.OUT_OF_ORDER
        shifts[late] -= self._late_ms[(high[late] >> np.uint64(16)).astype(np.int64)]
        shifts[back] -= 1 + (high[back] * self._disorder_ms >> _HIGH).astype(np.int64)
        shifts[faults == Fault.FUTURE] += self.future_ms
        return shifts

    def _steps(self, drawn: npt.NDArray[np.uint64], faults: npt.NDArray[np.uint8]) -> Times:
        """How far back to look from each record for one that can be repeated; 0 where it is one."""
        back = 1 + ((drawn >> _HIGH) * self._distance >> _HIGH).astype(np.int64)
        return np.where(faults == Fault.DUPLICATE, back, np.where(_REPEATABLE[faults], 0, 1))

    def _sources(self, first: int, drawn: npt.NDArray[np.uint64], repeats: Times) -> Times:
        """The record that each repeat repeats, below 0 where there is none.

        A repeat of a repeat is one of the record that the latter repeats; in place of a record that is broken the one before is taken.
        """
        steps = self._steps(drawn, self._kinds(drawn))
        at = first + repeats - steps[repeats]
        while True:
            there = np.flatnonzero(at >= 0)
            lowest = int(at[there].min()) if len(there) else first
            if lowest < first:  # look further back
                more = min(first, max(first - lowest, len(steps)))
                before = self._words("faults", first - more, more)
                steps = np.concatenate([self._steps(before, self._kinds(before)), steps])
                first -= more
            moves = steps[at[there] - first]
            if not moves.any():
                return at
            at[there] -= moves

    def _times_of(self, indexes: Times, due: Due) -> Times:
        """Event times of records that are no repeats, in any order."""
        lowest = int(indexes.min())
        count = int(indexes.max()) - lowest + 1
        drawn = self._words("faults", lowest, count)
        return (due(lowest, count) + self._shifts(self._kinds(drawn), drawn))[indexes - lowest]


def _reach(settings: Settings) -> int:
    """In how many records behind a record its repeats lie, but for one in a million of them.

    Who looks for a record to repeat comes by repeats, each of which leads up to the distance further back, and by broken records, which
    lead one back; how many there are of either is geometric.
    """
    repeats = settings.duplicate_share
    readable = settings.late_share + settings.disorder_share
    broken = sum(getattr(settings, name) for name in FAULT_SHARES) - repeats - readable
    return _beyond(repeats / (1.0 - broken)) * settings.duplicate_distance + _beyond(broken / (1.0 - repeats))


def _beyond(ratio: float) -> int:
    """What is passed once in two million times by a count that goes on with this probability."""
    return math.ceil(_RARE / -math.log(ratio)) if ratio > _NONE else 0


@functools.cache
def lateness_table(law: str, mean_s: float, most_s: float) -> npt.NDArray[np.int64]:
    """65,536 equally likely latenesses, milliseconds, none above the maximum: entry k is the quantile at (k + ½) / 65,536."""
    shares = ((k + 0.5) / _LAW_ENTRIES for k in range(_LAW_ENTRIES))
    quantile: dict[str, Callable[[float], float]] = {
        "fixed": lambda share: 1.0,
        "uniform": lambda share: 2 * share,
        "exponential": lambda share: -math.log1p(-share),
    }
    of = quantile[law]
    table = np.array(
        [max(1, min(round(most_s * 1000), round(mean_s * 1000 * of(share)))) for share in shares], np.int64
    )
    table.setflags(write=False)
    return table
