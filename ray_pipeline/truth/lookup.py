"""Which rating of a shard is meant: (user, movie, event time) → index, for many at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ray_pipeline.truth.replay import ShardReplay

__all__ = ["find_ratings"]

Ids = npt.NDArray[np.int64]

_GAP = 512  # drawing so many ratings costs less than beginning a run anew
_RUN = 1 << 18  # ratings drawn at a time, so that memory stays bounded


def find_ratings(
    replay: ShardReplay, user_ids: Ids, movie_ids: Ids, times_ms: Ids
) -> tuple[Ids, npt.NDArray[np.uint8]]:
    """Find ratings of one shard by what they say of themselves.

    The time gives the candidates, whose ratings are drawn again; the first that has the user and the movie is meant. Fast
    where times lie close together, as a reader of the stream has them; each that lies apart costs about 0.1 ms.

    Args:
        replay: the shard.
        user_ids: shape (n,), int64, n ≤ 2^20.
        movie_ids: shape (n,), int64.
        times_ms: shape (n,), int64, epoch milliseconds.

    Returns:
        Indexes, shape (n,), int64, -1 where there is no such rating; half stars, shape (n,), uint8, 0 there.
    """
    times, time = np.unique(times_ms, return_inverse=True)
    users, user = np.unique(user_ids, return_inverse=True)
    movies, movie = np.unique(movie_ids, return_inverse=True)
    names, name = np.unique((time * len(users) + user) * len(movies) + movie, return_inverse=True)
    index, half_stars = np.full(len(names), -1, np.int64), np.zeros(len(names), np.uint8)
    for first, count in _near(replay, times):
        drawn = replay.model.draw(first, count)
        time, known_time = _position(times, replay.times_ms(first, count))
        user, known_user = _position(users, drawn.user_ids)
        movie, known_movie = _position(movies, drawn.movie_ids)
        there = np.flatnonzero(known_user & known_movie & known_time)
        found, wanted = _position(names, (time[there] * len(users) + user[there]) * len(movies) + movie[there])
        there, found = there[wanted], found[wanted]
        found, earliest = np.unique(found, return_index=True)
        fresh = index[found] < 0
        found, there = found[fresh], there[earliest[fresh]]
        index[found], half_stars[found] = first + there, drawn.half_stars[there]
    return index[name], half_stars[name]


def _near(replay: ShardReplay, times: Ids) -> Iterator[tuple[int, int]]:
    """First and count of the runs of ratings that may name one of some ascending times."""
    for starts, stops in replay.due_between(times):
        for first, count in _runs(starts, stops):
            if replay.valid is None:
                yield first, count
                continue
            # few of those who lie there are late: only they are drawn
            _, known = _position(times, replay.times_ms(first, count))
            hits = first + np.flatnonzero(known)
            yield from _runs(hits, hits + 1)


def _position(ordered: Ids, values: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Where each value stands in ascending distinct ones, and whether it is there."""
    position = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return position, ordered[position] == values


def _runs(starts: Ids, stops: Ids) -> Iterator[tuple[int, int]]:
    """First and count of the runs of indexes to draw, ascending; small gaps are drawn too."""
    filled = stops > starts
    if not filled.any():
        return
    starts, stops = starts[filled], stops[filled]
    cuts = np.flatnonzero(starts[1:] - stops[:-1] > _GAP) + 1
    for lo, hi in zip([0, *cuts.tolist()], [*cuts.tolist(), len(starts)], strict=True):
        if lo < hi:
            for first in range(int(starts[lo]), int(stops[hi - 1]), _RUN):
                yield first, min(_RUN, int(stops[hi - 1]) - first)
