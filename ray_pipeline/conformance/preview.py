"""What some settings make of a stream, in a few numbers: a sample of its records, made without sending any."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.conformance.world import World
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.events import EventBatch, Fault
from ray_pipeline.generator.plan import ShardSchedule
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.model.faults import make_faults
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.model.sessions import LANES
from ray_pipeline.scenario import parse_attack, parse_drift

__all__ = ["PREVIEW_RECORDS", "RATE_STEPS", "RATE_STEP_S", "Preview", "preview", "span_of"]

PREVIEW_RECORDS = 20_000
"""Records of a sample."""
RATE_STEPS = 120
"""Times at which the planned rate is told."""
RATE_STEP_S = 5
"""Seconds between them."""

_STRETCHES = 25
_BINS = 50
_FEWEST_IN_BINS = 100
_MOST_NUMBERS = 40_000_000
_MOST_PARTITIONS = 64
_MOST_SPAN = 100_000_000  # what random arrivals can be counted through in time
_MOST_LOOKED_AT = 50_000_000
_TOP = 10

Row = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Preview:
    """A sample in numbers. Shares are 0 … 1; NaN where the sample cannot tell.

    Attributes:
        records: how many records the sample has; fewer than asked where the plan ends before.
        span: of how many of the stream's first records it is, evenly.
        planned: shape (RATE_STEPS,), rate of the plan every ``RATE_STEP_S`` seconds, ratings per second.
        stars: shape (10,), share of the valid ratings by half star.
        course: shape (stretches,), mean of the valid ratings along the span, stars.
        rate: ratings per second, mean over those times.
        burstiness: variance over mean of the counts in short stretches of time: 0 = evenly, 1 = at random, more = in bursts.
        mean: of the valid ratings, stars.
        spread: their standard deviation, stars.
        explained: share of their variance that follows from user, movie and taste, and so can be learned.
        top_movies: share of the records that the ten most rated movies have.
        top_users: share of the records that the ten most active users have.
        movies: how many movies there are among the records.
        users: how many users.
        session: ratings that a user gives in a row, mean; sessions run side by side.
        off_time: share of the records whose event time is not the time at which they are due, repeats aside.
        off_by_s: by how much, mean, seconds.
        repeated: share of the records that repeat an earlier one.
        unreadable: share of the records that are no valid rating.
        unknown_field: share of the records with a field that nobody knows.
        lost: ratings that are never sent, for each record.
        held: share of the records that a silence holds back.
    """

    records: int
    span: int
    planned: Row
    stars: Row
    course: Row
    rate: float
    burstiness: float
    mean: float
    spread: float
    explained: float
    top_movies: float
    top_users: float
    movies: int
    users: int
    session: float
    off_time: float
    off_by_s: float
    repeated: float
    unreadable: float
    unknown_field: float
    lost: float
    held: float


def span_of(settings: Settings) -> int:
    """In how many of the first records everything has happened that happens once (newcomers, drift, attacks), if that is soon."""
    ends = [float(PREVIEW_RECORDS)]
    if settings.new_user_share or settings.new_movie_share:
        ends.append(settings.arrival_ratings)
    ends += [(d.end or d.start + d.period) * 1.25 for d in map(parse_drift, settings.drift)]
    ends += [a.end * 1.25 for a in map(parse_attack, settings.attack)]
    return min(math.ceil(max(ends)), _MOST_SPAN)


def preview(settings: Settings, span: int) -> Preview:
    """A sample of the stream of some settings, in a few seconds at most.

    Args:
        settings: the event settings, rate and plan are used.
        span: of how many of the first records the sample is, ≥ ``PREVIEW_RECORDS``; see :func:`span_of`.

    Raises:
        ConfigurationError: the settings are too large for that.
        CatalogueError: catalogue or model file cannot be used.
    """
    _check_size(settings, span)
    world = World(settings)
    pieces = list(_pieces(world, span))
    if not pieces:
        raise ConfigurationError("the plan has no rating at all", "Raise its rates or its length")
    planned = np.array([world.plan.rate_at(world.start_ms + 1000 * RATE_STEP_S * n) for n in range(RATE_STEPS)])
    of_time_s = RATE_STEPS * RATE_STEP_S
    user = np.concatenate([p.events.user_ids for p in pieces])
    movie = np.concatenate([p.events.movie_ids for p in pieces])
    faults = np.concatenate([p.faults for p in pieces])
    # a repeat has the time of what it repeats
    off_s = (faults != Fault.DUPLICATE) * np.concatenate([p.events.timestamps_ms - p.due_ms for p in pieces]) / 1000
    held = np.concatenate([p.held for p in pieces])
    valid = faults < Fault.MALFORMED
    stars = np.concatenate([p.events.half_stars for p in pieces])[valid] / 2
    true = np.concatenate([p.scores for p in pieces])
    learnable = valid & (faults != Fault.DUPLICATE)  # a repeat has the place of another rating's noise
    records = len(user)
    return Preview(
        records,
        span,
        planned,
        _shares(np.bincount((stars * 2).astype(int), minlength=11)[1:11]),
        _course(pieces),
        world.plan.expected(world.start_ms + 1000 * of_time_s) / of_time_s,
        _burstiness(pieces),
        float(stars.mean()) if len(stars) else math.nan,
        float(stars.std()) if len(stars) else math.nan,
        _explained(true[learnable], np.concatenate([p.events.half_stars for p in pieces])[learnable]),
        _top(movie),
        _top(user),
        len(np.unique(movie)),
        len(np.unique(user)),
        _session(pieces),
        _share(off_s != 0),
        float(np.abs(off_s[off_s != 0]).mean()) if (off_s != 0).any() else 0.0,
        _share(faults == Fault.DUPLICATE),
        _share(~valid),
        _share(faults == Fault.UNKNOWN_FIELD),
        sum(p.lost for p in pieces) / max(1, records),
        _share(held),
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some consecutive records of a shard."""

    stretch: int
    events: EventBatch
    faults: npt.NDArray[np.uint8]
    due_ms: npt.NDArray[np.int64]
    held: npt.NDArray[np.bool_]
    lost: int
    scores: npt.NDArray[np.float32]


def _check_size(settings: Settings, span: int) -> None:
    numbers = (settings.users + settings.movies) * (settings.rank + 10)
    if numbers > _MOST_NUMBERS:
        raise ConfigurationError(
            f"too large for a preview: (users + movies) times (rank + 10) is {numbers:,}, more than {_MOST_NUMBERS:,}",
            "The command starts it all the same; for a preview lower users, movies or rank",
        )
    if settings.partitions > _MOST_PARTITIONS:
        raise ConfigurationError(
            f"too large for a preview: partitions={settings.partitions} is more than {_MOST_PARTITIONS}",
            "The command starts it all the same; for a preview lower partitions",
        )

    faults = make_faults(settings, 0)
    looked_at = settings.partitions * _STRETCHES * min(faults.reach, span) if faults else 0
    if looked_at > _MOST_LOOKED_AT:
        raise ConfigurationError(
            f"too large for a preview: repeats may lie {faults.reach if faults else 0:,} records back",
            "The command starts it all the same; for a preview lower duplicate_distance or duplicate_share",
        )


def _pieces(world: World, span: int) -> Iterator[_Piece]:
    """The sample: so many stretches of the span, evenly spread, of every shard; they touch where the span is no longer."""
    each = PREVIEW_RECORDS // _STRETCHES
    ever = world.plan.total()
    for partition in range(world.settings.partitions):
        model, schedule = world.shard(partition), world.schedules[partition]
        for stretch in range(_STRETCHES):
            start = span * stretch / _STRETCHES
            ends = (min(start, ever), min(start + each, ever))
            first, last = (schedule.arrivals.count_upto(end * schedule.share) for end in ends)
            if last > first:
                yield _piece(stretch, model, schedule, first, last - first)


def _piece(stretch: int, model: ShardModel, schedule: ShardSchedule, first: int, count: int) -> _Piece:
    events = ShardSequence(model, schedule, 0).events(first, count)
    due_ms = schedule.due_ms(first, count)
    spoilt = model.faults
    plain = np.zeros(count, np.uint8)
    user = np.searchsorted(model.users.user_ids, events.user_ids)
    movie = np.searchsorted(model.movies.movie_ids, events.movie_ids)
    return _Piece(
        stretch,
        events,
        plain if events.faults is None else events.faults,
        due_ms,
        plain > 0 if spoilt is None else spoilt.sent_ms(due_ms) > due_ms,
        0 if spoilt is None else len(spoilt.dropped(first, count)),
        model.score_at(user, movie, np.arange(first, first + count)),
    )


def _course(pieces: list[_Piece]) -> Row:
    found = np.full(_STRETCHES, np.nan)
    for stretch in range(_STRETCHES):
        there = [p.events.half_stars[p.faults < Fault.MALFORMED] for p in pieces if p.stretch == stretch]
        stars = np.concatenate(there) if there else np.empty(0)
        if len(stars):
            found[stretch] = stars.mean() / 2
    return found


def _burstiness(pieces: list[_Piece]) -> float:
    """Median over the stretches."""
    found = []
    for stretch in range(_STRETCHES):
        times = [p.due_ms for p in pieces if p.stretch == stretch and len(p.due_ms) >= 2]
        if not times:
            continue
        # where all shards are there
        start_ms, end_ms = max(int(t[0]) for t in times), min(int(t[-1]) for t in times)
        if end_ms - start_ms < _BINS:
            continue
        counts, _ = np.histogram(np.concatenate(times), _BINS, (start_ms, end_ms))
        if counts.sum() >= _FEWEST_IN_BINS:
            found.append(float(counts.var() / counts.mean()))
    return float(np.median(found)) if found else math.nan


def _session(pieces: list[_Piece]) -> float:
    """How rarely the user of a lane changes."""
    changed = [p.events.user_ids[LANES:] != p.events.user_ids[:-LANES] for p in pieces]
    share = _share(np.concatenate(changed)) if changed else 1.0
    return 1.0 / share if share else math.nan


def _explained(scores: npt.NDArray[np.float32], half_stars: npt.NDArray[np.uint8]) -> float:
    """Squared correlation of what is known and what was rated."""
    if len(scores) < 2 or half_stars.std() == 0 or scores.std() == 0:
        return 0.0
    return float(np.corrcoef(scores, half_stars)[0, 1] ** 2)


def _top(ids: npt.NDArray[np.int64]) -> float:
    counts = np.unique(ids, return_counts=True)[1]
    return float(np.sort(counts)[-_TOP:].sum() / len(ids)) if len(ids) else math.nan


def _share(chosen: npt.NDArray[np.bool_]) -> float:
    return float(chosen.mean()) if len(chosen) else 0.0


def _shares(counts: npt.NDArray[np.int64]) -> Row:
    return np.asarray(counts / max(1, int(counts.sum())), np.float64)
