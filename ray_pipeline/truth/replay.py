"""The stream again, from what the run published of itself: settings, and the plan as each shard lived it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import EVENT_FIELDS, Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import StateMismatchError
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.plan import RatePlan, ShardSchedule
from ray_pipeline.model.catalogue import Catalogue, load_catalogue
from ray_pipeline.model.population import Movies, build_movies, build_user_map, build_users
from ray_pipeline.model.ratings import ShardModel

__all__ = ["ShardReplay", "build_models", "published_catalogue", "published_settings"]

_BEYOND = 1_000_000
"""So many ratings more than a shard says it has sent are still recognised as its own."""


def published_catalogue(settings: Settings, run: Mapping[str, Any]) -> Catalogue:
    """The movies that a run's ratings may be of: the built-in catalogue of the run's own size, or the file that one names.

    Args:
        settings: one's own; ``catalog`` is used.
        run: record ``run`` of topic ``ratings.progress``.

    Raises:
        CatalogueError: the file is missing, or a row is malformed.
    """
    return load_catalogue(settings.model_copy(update={"movies": run["settings"]["movies"]}))


def published_settings(settings: Settings, run: Mapping[str, Any], catalogue: Catalogue) -> Settings:
    """One's own settings, with the event settings that a run published.

    Args:
        settings: one's own.
        run: record ``run`` of topic ``ratings.progress``.
        catalogue: the movies at hand.

    Raises:
        StateMismatchError: the catalogue at hand is not the run's, so that its ratings cannot be made again.
    """
    found = settings.model_copy(update={name: run["settings"][name] for name in EVENT_FIELDS})
    if found.digest(catalogue.digest) != run["config"]:
        raise StateMismatchError(
            problem=f"the ratings of run {run['run']} were made with another catalogue ({run['catalogue']}, "
            f"not {catalogue.digest})",
            fix="Give the run's own movies.csv with --catalog",
        )
    return found


def build_models(
    settings: Settings, catalogue: Catalogue, partitions: Iterable[int], movies: Movies | None = None
) -> dict[int, ShardModel]:
    """The models of some shards, by partition.

    Args:
        settings: the event settings are used.
        catalogue: the movies.
        partitions: which shards.
        movies: all movies, if they are made already.
    """
    movies = movies or build_movies(settings, catalogue)
    user_map = build_user_map(settings)
    return {p: ShardModel(settings, p, build_users(settings, user_map.users_of(p)), movies) for p in partitions}


class ShardReplay:
    """The ratings of one shard with their times.

    Args:
        model: draws them.
        progress: has the plan as the shard lived it.
    """

    def __init__(self, model: ShardModel, progress: ShardProgress) -> None:
        self.partition = model.partition
        self.model = model
        self.progress = progress
        self._schedule = ShardSchedule(RatePlan(progress.epochs), progress.share, progress.phase)

    def update(self, progress: ShardProgress) -> None:
        """Take a newer progress record of the same shard."""
        if progress.epochs != self.progress.epochs:
            self._schedule = ShardSchedule(RatePlan(progress.epochs), progress.share, progress.phase)
        self.progress = progress

    def events(self, first: int, count: int) -> EventBatch:
        """Ratings ``first … first + count - 1``."""
        drawn = self.model.draw(first, count)
        times = self._schedule.due_ms(first, count)
        return EventBatch(self.partition, first, drawn.user_ids, drawn.movie_ids, drawn.half_stars, times)

    def due_ms(self, index: int) -> int:
        """Event time of one rating, epoch milliseconds; ``plan.NEVER_MS`` where the plan does not reach it."""
        return int(self._schedule.due_ms(index, 1)[0])

    def first_at(self, times_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Index of the first rating that is due at each event time or later, not beyond those that may have been sent.

        Args:
            times_ms: shape (n,), int64, epoch milliseconds, in any order.

        Returns:
            Shape (n,), int64.
        """
        return self._schedule.count_before(times_ms, self.progress.next_index + _BEYOND)

    def rate_at(self, event_ms: int) -> float:
        """Rate in force at an event time, ratings per second over all shards."""
        return self._schedule.plan.rate_at(event_ms)

    def count_before(self, event_ms: int) -> int:
        """How many ratings are due before an event time, epoch milliseconds, of those that may have been sent."""
        return int(self.first_at(np.array([event_ms], np.int64))[0])

    def at(self, event_ms: int) -> range:
        """Indexes of the ratings that are due at an event time, to the millisecond, among those that may have been sent."""
        start, stop = self.first_at(np.array([event_ms, event_ms + 1], np.int64)).tolist()
        return range(start, stop)

    def index_of(self, value: bytes | None, at_least: int = 0) -> int | None:
        """Which rating of the shard a record's value is; None when it is none.

        Args:
            value: the record's value; its text does not matter, its four fields do.
            at_least: of several equal ratings, the first from here on is meant, else the last.
        """
        rating = _rating(value)
        indexes = self.at(rating["timestamp"]) if rating else range(0)
        if not rating or not indexes:
            return None
        events = self.events(indexes.start, len(indexes))
        same = (
            (events.user_ids == rating["userId"])
            & (events.movie_ids == rating["movieId"])
            & (events.half_stars == rating["rating"] * 2)
        )
        found = [indexes.start + n for n in np.flatnonzero(same).tolist()]
        return next((i for i in found if i >= at_least), found[-1] if found else None)


def _rating(value: bytes | None) -> dict[str, Any] | None:
    """The four fields of a record's value, when it has just these and they are numbers in range."""
    try:
        rating = json.loads(value or b"")
    except ValueError:
        return None
    if not isinstance(rating, dict) or set(rating) != {"userId", "movieId", "rating", "timestamp"}:
        return None
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in rating.values()):
        return None
    whole = all(isinstance(rating[n], int) and 0 < rating[n] < 2**53 for n in ("userId", "movieId", "timestamp"))
    return rating if whole else None
