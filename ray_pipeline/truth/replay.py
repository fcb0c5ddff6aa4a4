"""The stream again, from what the run published of itself: settings, and the plan as each shard lived it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import EVENT_FIELDS, Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import StateMismatchError
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.model.catalogue import Catalogue, load_catalogue
from ray_pipeline.model.population import Movies, build_movies, build_user_map, build_users
from ray_pipeline.model.ratings import ShardModel

__all__ = ["ShardReplay", "build_models", "published_catalogue", "published_settings"]


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
        self._sequence = ShardSequence.of(model, progress)

    def update(self, progress: ShardProgress) -> None:
        """Take a newer progress record of the same shard."""
        if progress.epochs != self.progress.epochs:
            self._sequence = ShardSequence.of(self.model, progress)
        else:
            self._sequence = replace(self._sequence, sent=progress.next_index)
        self.progress = progress

    def events(self, first: int, count: int) -> EventBatch:
        """Ratings ``first … first + count - 1``."""
        return self._sequence.events(first, count)

    def due_ms(self, index: int) -> int:
        """See :meth:`ShardSequence.due_ms`."""
        return self._sequence.due_ms(index)

    def rate_at(self, event_ms: int) -> float:
        """Rate in force at an event time, ratings per second over all shards."""
        return self._sequence.schedule.plan.rate_at(event_ms)

    def first_at(self, times_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """See :meth:`ShardSequence.first_at`."""
        return self._sequence.first_at(times_ms)

    def count_before(self, event_ms: int) -> int:
        """How many ratings are due before an event time, epoch milliseconds, of those that may have been sent."""
        return int(self.first_at(np.array([event_ms], np.int64))[0])

    def at(self, event_ms: int) -> range:
        """See :meth:`ShardSequence.at`."""
        return self._sequence.at(event_ms)

    def index_of(self, value: bytes | None, at_least: int = 0) -> int | None:
        """See :meth:`ShardSequence.index_of`."""
        return self._sequence.index_of(value, at_least)
