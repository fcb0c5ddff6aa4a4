"""A sample beside what is declared, and what several checks need of both: made once, when first asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ray_pipeline.conformance.sample import Sample
from ray_pipeline.conformance.scores import Intervals, ScoreFit, Terms, fit_scores
from ray_pipeline.conformance.world import World
from ray_pipeline.events import Fault
from ray_pipeline.model.faults import make_faults
from ray_pipeline.model.population import Habits
from ray_pipeline.truth.rise import longest_rise

__all__ = ["Evidence", "Known", "OnTime"]

_SCORED_MOST = 1_000_000
"""Ratings whose scores are judged, evenly spread over the sample: more would add time, and precision that nobody can use."""
_ENDS = 20


@dataclass(frozen=True, slots=True)
class Known:
    """The ratings of the sample whose user and movie are declared ones.

    Attributes:
        row: shape (n,), position in the sample.
        user: shape (n,), position in ``World.users``.
        movie: shape (n,), position in ``World.movies``.
        half_stars: shape (n,).
    """

    row: npt.NDArray[np.int64]
    user: npt.NDArray[np.int64]
    movie: npt.NDArray[np.int64]
    half_stars: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.row)

    def spread(self, most: int) -> Known:
        """At most so many of them, evenly spread."""
        if len(self) <= most:
            return self
        chosen = np.linspace(0, len(self) - 1, most).astype(np.int64)
        return Known(self.row[chosen], self.user[chosen], self.movie[chosen], self.half_stars[chosen])


@dataclass(frozen=True, slots=True)
class OnTime:
    """Ratings of one partition whose event time is the time at which they were due.

    Attributes:
        index: shape (n,), ascending: which rating of the partition each is.
        times_ms: shape (n,), not decreasing, epoch milliseconds.
        start_ms: when the first rating of the plan may be due, epoch milliseconds.
    """

    index: npt.NDArray[np.int64]
    times_ms: npt.NDArray[np.int64]
    start_ms: int

    def due_by(self, times_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """How many ratings of the partition were due at each time or before; those between two that are known, evenly."""
        # before the first there is none, at the start
        known_ms, known = np.insert(self.times_ms, 0, self.start_ms - 1), np.insert(self.index, 0, -1)
        at = np.maximum(np.searchsorted(known_ms, times_ms, "right") - 1, 0)
        after = np.minimum(at + 1, len(known) - 1)
        between = np.maximum(known[after] - known[at] - 1, 0) * (times_ms >= known_ms[at])
        evenly = (times_ms - known_ms[at]) / np.maximum(known_ms[after] - known_ms[at], 1)
        return np.asarray(known[at] + 1 + between * evenly, np.float64)


class Evidence:
    """What the checks look at.

    Args:
        sample: what was emitted.
        declared: what it is judged against.
    """

    def __init__(self, sample: Sample, declared: World) -> None:
        self.raw = sample
        self.declared = declared
        # the people of a repeated rating did not rate again
        self.sample = sample.where(self.repeats == 0) if self.broken_on_purpose else sample

    @functools.cached_property
    def broken_on_purpose(self) -> bool:
        """Whether records are declared to be broken, repeated or wrong about their time."""
        settings = self.declared.settings
        return any(make_faults(settings, partition) is not None for partition in range(settings.partitions))

    @property
    def records(self) -> int:
        """All records, those that are no rating too."""
        return len(self.raw) + self.raw.unreadable

    @functools.cached_property
    def sent(self) -> dict[int, int]:
        """How many records there are of each declared partition, as far as can be told."""
        partitions, index = self.raw.partition, self.raw.index
        declared = [p for p in np.unique(partitions).tolist() if p in self.declared.schedules]
        return {p: int(index[partitions == p].max()) + 1 for p in declared}

    @functools.cached_property
    def shifts_ms(self) -> npt.NDArray[np.int64]:
        """Shape (raw,): event time of each rating less the time at which it is due, milliseconds; 0 in undeclared partitions."""
        shifts = np.where(np.isin(self.raw.partition, list(self.declared.schedules)), self.raw.timestamps_ms, 0)
        for partition, sent in self.sent.items():
            row = np.flatnonzero(self.raw.partition == partition)
            shifts[row] -= self.declared.schedules[partition].due_ms(0, sent)[self.raw.index[row]]
        return shifts

    @functools.cached_property
    def skews_ms(self) -> list[int]:
        """By how much the clock of each shard is wrong: what most of its event times are off by, milliseconds."""
        found = []
        partitions = max(self.declared.settings.partitions, int(self.raw.partition.max(initial=0)) + 1)
        for partition in range(partitions):
            distinct, counts = np.unique(self.shifts_ms[self.raw.partition == partition], return_counts=True)
            found.append(int(distinct[counts.argmax()]) if len(distinct) else 0)
        return found

    @functools.cached_property
    def repeats(self) -> npt.NDArray[np.int64]:
        """Shape (raw,): how many records back the one lies that each repeats; 0 where a rating repeats none.

        Two honest ratings of a moment may be alike: what the seed draws in its own place is no repeat of what says the same before it.
        """
        raw = self.raw
        names = (raw.partition, raw.timestamps_ms, raw.user_ids, raw.movie_ids, raw.half_stars)
        order = np.lexsort((raw.index, *names))
        same = np.ones(len(raw), np.bool_)
        same[:1] = False
        for column in names:
            same[1:] &= column[order][1:] == column[order][:-1]
        same[same] = ~self._own(order[same])
        group = np.maximum.accumulate(np.where(same, 0, np.arange(len(raw))))
        found = np.zeros(len(raw), np.int64)
        found[order] = raw.index[order] - raw.index[order][group]
        return found

    def _own(self, row: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each of some records has the user and movie that the seed draws in its place, and is to repeat none, shape (k,)."""
        raw, own = self.raw, np.zeros(len(row), np.bool_)
        for p in range(self.declared.settings.partitions):
            mine = np.flatnonzero(raw.partition[row] == p)
            if not len(mine):
                continue
            at, model = raw.index[row[mine]], self.declared.shard(p)
            first, count = int(at.min()), int(at.max() - at.min()) + 1
            drawn = model.draw(first, count)
            user, movie = drawn.user_ids[at - first], drawn.movie_ids[at - first]
            own[mine] = (user == raw.user_ids[row[mine]]) & (movie == raw.movie_ids[row[mine]])
            if model.faults is not None:  # a declared repeat may happen to be of the same user and movie
                fates = model.faults.fates(first, count, self.declared.schedules[p].due_ms)
                own[mine] &= fates.faults[at - first] != Fault.DUPLICATE
        return own

    @functools.cached_property
    def user(self) -> npt.NDArray[np.int64]:
        """Shape (n,): position of each rating's user in ``World.users``, -1 where it is none of them."""
        return self.declared.user_at(self.sample.user_ids)

    @functools.cached_property
    def movie(self) -> npt.NDArray[np.int64]:
        """Shape (n,): position of each rating's movie in the declared catalogue, -1 where it is none of it."""
        return self.declared.catalogue.index_of(self.sample.movie_ids)

    @functools.cached_property
    def struck(self) -> npt.NDArray[np.bool_]:
        """Shape (n,): whether each rating is one that a declared attack must have given, camouflage included."""
        found = np.zeros(len(self.sample), np.bool_)
        if self.declared.settings.attack:
            for p, row in self._by_shard(np.arange(len(self.sample))):
                found[row] = self.declared.shard(p).struck(self.sample.index[row])
        return found

    @functools.cached_property
    def position(self) -> npt.NDArray[np.float64]:
        """Shape (n,): ratings of all shards before each one, by its index; see ``model/arrival.py``."""
        shares = [self.declared.user_map.share(p) for p in range(self.declared.settings.partitions)]
        shard = np.minimum(self.sample.partition, len(shares) - 1)
        return np.asarray(self.sample.index / np.array(shares)[shard])

    @functools.cached_property
    def known(self) -> Known:
        """Ratings of declared users and movies, but those of declared attacks, which stand in the place of random ones."""
        row = np.flatnonzero((self.user >= 0) & (self.movie >= 0) & ~self.struck)
        return Known(row, self.user[row], self.movie[row], self.sample.half_stars[row])

    @functools.cached_property
    def scored(self) -> Known:
        """Those whose scores are judged."""
        return self.known.spread(_SCORED_MOST)

    @functools.cached_property
    def terms(self) -> Terms:
        """The random terms of the scored ratings, each of variance 1, as the seed makes them."""
        return Terms.of(self.declared.unit.users, self.declared.unit.movies, self.scored.user, self.scored.movie)

    @functools.cached_property
    def drift(self) -> npt.NDArray[np.float32]:
        """What declared drift adds to the score of each scored rating, stars."""
        found = np.zeros(len(self.scored), np.float32)
        if self.declared.settings.drift:
            for p, at in self._by_shard(self.scored.row):
                model, row = self.declared.shard(p), self.scored.row[at]
                ids = self.sample.user_ids[row]
                user = np.minimum(np.searchsorted(model.users.user_ids, ids), len(model.users.user_ids) - 1)
                found[at] = model.drift_at(user, self.scored.movie[at], self.sample.index[row])
        return found

    @functools.cached_property
    def habits(self) -> Habits:
        """How each scored rating's user gives stars."""
        return self.declared.users.habits.of(self.scored.user)

    @functools.cached_property
    def true_scores(self) -> npt.NDArray[np.float32]:
        """The declared score of each scored rating, without noise, stars."""
        return self.declared.model.score(self.scored.user, self.scored.movie) + self.drift

    @functools.cached_property
    def again(self) -> Evidence:
        """The same users and movies at the same places of the stream, with other random numbers: what else might have happened."""
        sample, users, movies = self.sample, np.zeros_like(self.sample.user_ids), np.zeros_like(self.sample.movie_ids)
        for p, row in self._by_shard(np.arange(len(sample))):
            drawn = self.declared.shard_again(p).draw(0, int(sample.index[row].max()) + 1)
            users[row], movies[row] = drawn.user_ids[sample.index[row]], drawn.movie_ids[sample.index[row]]
        return Evidence(replace(sample, user_ids=users, movie_ids=movies), self.declared)

    def _by_shard(self, row: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Places in ``row``, by declared partition."""
        for p in range(self.declared.settings.partitions):
            at = np.flatnonzero(self.sample.partition[row] == p)
            if len(at):
                yield p, at

    @functools.cached_property
    def fit(self) -> ScoreFit | None:
        """Scale of every term, estimated from the ratings; None when there are too few."""
        return fit_scores(self.terms, Intervals.of(self.scored.half_stars, self.drift, self.habits))

    @functools.cached_property
    def on_time(self) -> dict[int, OnTime]:
        """The ratings of each partition whose event time is, by all appearances, the time at which they were due.

        Where nothing is broken on purpose that is all of them. Else it is the longest row of them whose times do not decrease, without
        what the shard's clock is declared to be wrong by: late records stand out of it below, those of the future above. Its ends are
        left out, for nothing stands out there.
        """
        found = {}
        for partition in np.unique(self.raw.partition).tolist():
            row = np.flatnonzero(self.raw.partition == partition)
            index, times_ms = self.raw.index[row], self.raw.timestamps_ms[row]
            if self.broken_on_purpose:
                faults = make_faults(self.declared.settings, partition)
                chosen = longest_rise(times_ms.tolist(), strictly=False)
                ends = min(_ENDS, len(chosen) // 4)
                chosen = chosen[ends : len(chosen) - ends]
                index, times_ms = index[chosen], times_ms[chosen] - (faults.skew_ms if faults else 0)
            found[partition] = OnTime(index, times_ms, self.declared.start_ms)
        return found

    @property
    def on_time_share(self) -> float:
        """Share of the records that are on time."""
        return sum(len(known.index) for known in self.on_time.values()) / max(1, self.records)

    def due_by(self, times_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """How many ratings of the sample were due at each time or before, shape of ``times_ms``, epoch milliseconds ascending.

        Between two that are on time the others are taken to lie evenly.
        """
        found = np.zeros(len(times_ms))
        for known in self.on_time.values():
            found += known.due_by(times_ms)
        return found

    @functools.cached_property
    def through_ms(self) -> int:
        """Event time up to which every partition is in the sample."""
        known = [self.on_time.get(p) for p in range(self.declared.settings.partitions)]
        return min(int(of.times_ms.max(initial=0)) if of is not None else 0 for of in known)
