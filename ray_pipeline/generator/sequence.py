"""The ratings of one shard with their times, and which of them a record is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.codec import encode_values, parse_object
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.events import EventBatch, Fault
from ray_pipeline.generator.plan import ShardSchedule
from ray_pipeline.model.faults import Fates
from ray_pipeline.model.ratings import Drawn, ShardModel

__all__ = ["LOOK_AT", "ShardSequence", "has_sent"]

LOOK_AT = 100
"""So many of the newest records of a partition say how far it is, as a rule."""

_BEYOND = 1_000_000
"""So many ratings more than a shard says it has sent are still recognised as its own."""
_AT_ONCE = 1 << 18
_PIECE = 1 << 13
_NO_CHANCE = 3
"""So many ratings of somebody else are not the first ones of a shard, in their order, by chance."""
_TAIL = 8


@dataclass(frozen=True, slots=True)
class ShardSequence:
    """What one shard sends, as it lived it, and as it would go on.

    Attributes:
        model: draws the ratings.
        schedule: has their times.
        sent: how many ratings the shard says it has sent.
    """

    model: ShardModel
    schedule: ShardSchedule
    sent: int

    @classmethod
    def of(cls, model: ShardModel, progress: ShardProgress) -> ShardSequence:
        """By a progress record of the shard."""
        return cls(model, ShardSchedule.lived(progress), progress.next_index)

    def events(self, first: int, count: int) -> EventBatch:
        """Ratings ``first … first + count - 1``, as they are sent."""
        drawn = self.model.draw(first, count)
        fates = self.fates(first, count)
        if fates is None:
            times = self.schedule.due_ms(first, count)
            return EventBatch(self.model.partition, first, drawn.user_ids, drawn.movie_ids, drawn.half_stars, times)
        drawn, at = self._with_sources(drawn, fates)
        return EventBatch(
            self.model.partition,
            first,
            drawn.user_ids[at],
            drawn.movie_ids[at],
            drawn.half_stars[at],
            fates.times_ms,
            fates.faults,
            fates.details,
        )

    def fates(self, first: int, count: int) -> Fates | None:
        """What becomes of records ``first … first + count - 1``; None when nothing is broken on purpose."""
        faults = self.model.faults
        return None if faults is None else faults.fates(first, count, self.schedule.due_ms)

    def times_ms(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Event times that records ``first … first + count - 1`` name, epoch milliseconds."""
        fates = self.fates(first, count)
        return self.schedule.due_ms(first, count) if fates is None else fates.times_ms

    def due_ms(self, index: int) -> int:
        """When one rating is due, epoch milliseconds; ``plan.NEVER_MS`` where the plan does not reach it."""
        return int(self.schedule.due_ms(index, 1)[0])

    def first_at(self, times_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Index of the first rating that is due at each event time or later, not beyond those that may have been sent.

        Args:
            times_ms: shape (n,), int64, epoch milliseconds, in any order.

        Returns:
            Shape (n,), int64.
        """
        return self.schedule.count_before(times_ms, self.sent + _BEYOND)

    def due_between(self, times_ms: npt.NDArray[np.int64]) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Where the ratings lie that name some event times: first indexes and ends (exclusive), each of the times' shape.

        In these stretches there are others too, where faults are on. Repeats of a rating are looked for behind it.
        """
        faults = self.model.faults
        ways = [(0, 0)] if faults is None else [(faults.skew_ms, faults.behind_ms)]
        if faults is not None and faults.future_ms:
            ways.append((faults.skew_ms + faults.future_ms, 0))
        return [
            (self.first_at(times_ms - ahead), self.first_at(times_ms - ahead + behind + 1)) for ahead, behind in ways
        ]

    def at(self, event_ms: int) -> list[int]:
        """Indexes of the ratings that name an event time, to the millisecond, among those that may have been sent; ascending."""
        found = []
        for starts, stops in self.due_between(np.array([event_ms], np.int64)):
            for first in range(int(starts[0]), int(stops[0]), _AT_ONCE):
                times = self.times_ms(first, min(_AT_ONCE, int(stops[0]) - first))
                found += (first + np.flatnonzero(times == event_ms)).tolist()
        return sorted(found)

    def index_of(self, value: bytes | None, at_least: int = 0) -> int | None:
        """Which rating of the shard a record's value is; None when it is none.

        Args:
            value: the record's value; its text does not matter, its four fields do.
            at_least: of several equal ratings, the first from here on is meant, else the last.
        """
        rating = _rating(value)
        indexes = self.at(rating["timestamp"]) if rating else []
        if not rating or not indexes:
            return None
        reach = self.model.faults.reach if self.model.faults else 0
        found: list[int] = []
        for first, count in _runs(indexes, reach):
            events = self.events(first, count)
            same = (
                (events.user_ids == rating["userId"])
                & (events.movie_ids == rating["movieId"])
                & (events.half_stars == rating["rating"] * 2)
                & (events.timestamps_ms == rating["timestamp"])
            )
            if events.faults is not None:
                same &= events.faults < Fault.UNKNOWN_FIELD
            found += (first + np.flatnonzero(same)).tolist()
        return next((i for i in found if i >= at_least), found[-1] if found else None)

    def held(self, newest: Sequence[bytes | None]) -> int:
        """How many ratings a partition holds, by its newest records: those that the shard says it has sent, as a rule.

        What else lies there, put there by somebody, is passed over; one rating may look like another of the same
        millisecond, so it is the number that explains the most of the newest :data:`LOOK_AT` records. But where a rating is
        there, all before it are: earlier ones that lie behind it are copies.

        Args:
            newest: values of the newest committed records of the partition, the last one first; none when it never had any. The more
                there are, the more copies are passed over.
        """
        if not newest:
            return 0
        # one rating is like no other; of those that are broken on purpose many are alike
        tail = min(self.sent, len(newest), 1 if self.model.faults is None else _TAIL)
        if tail and list(newest[tail - 1 :: -1]) == encode_values(self.events(self.sent - tail, tail)):
            return self.sent
        seen, newest = newest, newest[:LOOK_AT]
        known = [(n, index + 1) for n, value in enumerate(newest) if (index := self.index_of(value)) is not None]
        ends = {end for _, end in known}
        if self.model.faults is not None:  # those that say nothing of themselves are known by their place
            ends |= {
                end + n for n, end in known if n and list(newest[n - 1 :: -1]) == encode_values(self.events(end, n))
            }
        there = {value for value in newest if value is not None}
        explained = {}
        for end in ends:
            first = max(0, end - len(newest))
            explained[end] = len(there.intersection(encode_values(self.events(first, end - first))))
        held = max(explained, key=lambda end: (explained[end], end), default=self.sent)
        return held if held >= self.sent else self._highest(seen, held)

    def _highest(self, newest: Sequence[bytes | None], held: int) -> int:
        """As :meth:`held`, when the newest of the records say ``held``, which is too few: what follows the highest rating of all."""
        places = {value: n for n, value in enumerate(newest)}  # of several that are alike the oldest
        for stop in range(self.sent, max(held, self.sent - _BEYOND), -_PIECE):
            first = max(held, stop - _PIECE)
            for value in reversed(encode_values(self.events(first, stop - first))):
                if value not in places or (index := self.index_of(value)) is None or index < held:
                    continue
                following, found = encode_values(self.events(index + 1, places[value])), 0
                for other in reversed(newest[: places[value]]):
                    found += other == following[found]
                return index + 1 + found
        return held

    def _with_sources(self, drawn: Drawn, fates: Fates) -> tuple[Drawn, npt.NDArray[np.int64]]:
        """Ratings that hold what repeats repeat too, and where each record finds its own among them."""
        lowest = int(fates.sources.min(initial=fates.first))
        if lowest < fates.first:
            before = self.model.draw(lowest, fates.first - lowest)
            drawn = Drawn(*(np.concatenate([getattr(d, f.name) for d in (before, drawn)]) for f in fields(Drawn)))
        return drawn, fates.sources - lowest


def has_sent(model: ShardModel, oldest: Sequence[bytes | None]) -> bool:
    """Whether a partition begins with the ratings of a shard, at whatever times; what else lies between them is passed over.

    Args:
        model: draws the shard's ratings.
        oldest: values of the first records of the partition.
    """
    drawn = model.draw(0, len(oldest))
    own = list(zip(drawn.user_ids.tolist(), drawn.movie_ids.tolist(), drawn.half_stars.tolist(), strict=True))
    if model.faults is not None:  # those that are their own text
        kinds = model.faults.kinds(0, len(oldest))
        own = [own[n] for n in np.flatnonzero((kinds < Fault.UNKNOWN_FIELD) & (kinds != Fault.DUPLICATE))]
    found = 0
    for rating in filter(None, map(_rating, oldest)):
        found += (rating["userId"], rating["movieId"], rating["rating"] * 2) in own[found : found + 1]
    return found >= min(_NO_CHANCE, len(oldest)) > 0


def _runs(indexes: Sequence[int], reach: int) -> Iterator[tuple[int, int]]:
    """First and count of the runs that hold ascending indexes and so many records behind each; near ones in one run."""
    first = last = indexes[0]
    for index in indexes[1:]:
        if index > last + reach + 1:
            yield first, last + reach + 1 - first
            first = index
        last = index
    yield first, last + reach + 1 - first


def _rating(value: bytes | None) -> dict[str, Any] | None:
    """The four fields of a record's value, when it has just these and they are numbers in range."""
    rating = parse_object(value)
    if rating is None or set(rating) != {"userId", "movieId", "rating", "timestamp"}:
        return None
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in rating.values()):
        return None
    whole = all(isinstance(rating[n], int) and 0 < rating[n] < 2**53 for n in ("userId", "movieId", "timestamp"))
    return rating if whole else None
