"""What is declared: the settings, with everything that a rating's law follows from. Nothing here is estimated."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.generator.arrivals import poisson_arrivals
from ray_pipeline.generator.coordination import Coordinator
from ray_pipeline.generator.plan import RatePlan, ShardSchedule
from ray_pipeline.model.catalogue import Catalogue, load_catalogue
from ray_pipeline.model.population import Movies, UserMap, Users, build_movies, build_user_map, build_users
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.sinks.merged import untouched
from ray_pipeline.truth.law import probabilities

__all__ = ["START_MS", "World"]

START_MS = 1_767_225_600_000
"""Event time of the first instant where none is declared: 2026-01-01T00:00:00Z. A verdict must not depend on the clock."""

_OTHER_SEED = 0x5EED

_UNIT = {
    "mean_rating": 0.0,
    "rating_sd": 1.0,
    "user_bias_share": 1.0,
    "movie_bias_share": 1.0,
    "factor_share": 1.0,
    "popularity_exponent": 1.0,
    "activity_sigma": 1.0,
}


class World:
    """The declared users, movies, laws and times.

    Args:
        settings: the event and load settings are used.
        schedules: when each shard's ratings are due, by partition, as they were lived; None = as the settings plan them.
    """

    def __init__(self, settings: Settings, schedules: Mapping[int, ShardSchedule] | None = None) -> None:
        self.settings = settings
        self._schedules = schedules
        self._shards: dict[int, ShardModel] = {}

    @functools.cached_property
    def catalogue(self) -> Catalogue:
        """The movies."""
        return load_catalogue(self.settings)

    @functools.cached_property
    def user_map(self) -> UserMap:
        """Who belongs to which partition."""
        return build_user_map(self.settings)

    @functools.cached_property
    def users(self) -> Users:
        """All users of all shards, ascending."""
        return build_users(self.settings, self._user_ids)

    def user_at(self, user_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Position of each id in :attr:`users`, -1 where it is no declared user's."""
        position = np.minimum(np.searchsorted(self._user_ids, user_ids), len(self._user_ids) - 1)
        return np.where(self._user_ids[position] == user_ids, position, -1)

    @functools.cached_property
    def movies(self) -> Movies:
        """All movies, in the catalogue's order."""
        return build_movies(self.settings, self.catalogue)

    @functools.cached_property
    def model(self) -> ShardModel:
        """Scores any user: all of them as one shard. Its draws are no shard's."""
        return ShardModel(self.settings, 0, self.users, self.movies, 1.0)

    def shard(self, partition: int) -> ShardModel:
        """The model of one shard, which draws its ratings."""
        if partition not in self._shards:
            self._shards[partition] = ShardModel.of_shard(self.settings, partition, self.user_map, self.movies)
        return self._shards[partition]

    def shard_again(self, partition: int) -> ShardModel:
        """One shard with its users and the movies as they are, and other random numbers for what they do; nobody attacks."""
        users = self.shard(partition).users
        settings = self.settings.model_copy(update={"seed": self.settings.seed ^ _OTHER_SEED, "attack": ()})
        return ShardModel(settings, partition, users, self.movies, self.user_map.share(partition))

    @functools.cached_property
    def user_law(self) -> npt.NDArray[np.float64]:
        """Probability that a rating is by each user, shape (users,)."""
        return probabilities(self.users.activity)

    @functools.cached_property
    def movie_law(self) -> npt.NDArray[np.float64]:
        """Probability that a rating is of each movie, shape (movies,)."""
        return probabilities(self.movies.popularity)

    @functools.cached_property
    def unit(self) -> World:
        """The same users and movies with every term of variance 1 and every law of parameter 1.

        What the declared world scales by its settings stands here unscaled, so that a setting can be estimated as the scale that
        the ratings show.
        """
        return World(self.settings.model_copy(update=_UNIT))

    @functools.cached_property
    def schedules(self) -> dict[int, ShardSchedule]:
        """When each shard's ratings are due, by partition."""
        if self._schedules is not None:
            return dict(self._schedules)
        told = self._coordinator.assignments(START_MS)
        return {
            p: ShardSchedule(
                RatePlan(orders.epochs), orders.share, orders.phase, poisson_arrivals(orders.poisson_seed, p)
            )
            for p, orders in told.items()
        }

    @functools.cached_property
    def plan(self) -> RatePlan:
        """Ratings due by event time, over all shards."""
        return max((s.plan for s in self.schedules.values()), key=lambda plan: len(plan.epochs))

    @functools.cached_property
    def start_ms(self) -> int:
        """Event time of the first instant, epoch milliseconds."""
        return self.plan.epochs[0].from_ms

    @functools.cached_property
    def declared_total(self) -> int | None:
        """How many ratings the settings end after; None when they name no end."""
        if self._schedules is not None:
            return self.settings.ratings
        return self._coordinator.requested if self.schedules else None

    @property
    def laws_power(self) -> tuple[float, float]:
        """By which power of the unit world's laws users rate and movies are rated; a model file's laws stand there as they are."""
        s = self.settings
        return (s.activity_sigma, s.popularity_exponent) if s.model is None else (1.0, 1.0)

    @property
    def noise_share(self) -> float:
        """Share of variance that is noise."""
        s = self.settings
        return max(0.0, 1.0 - s.user_bias_share - s.movie_bias_share - s.factor_share)

    @functools.cached_property
    def _coordinator(self) -> Coordinator:
        """The generator's own, which decides what each shard sends."""
        partitions = range(self.settings.partitions)
        shares = [self.user_map.share(p) for p in partitions]
        coordinator = Coordinator(self.settings, self.settings.digest(self.catalogue.digest), shares)
        coordinator.observe([untouched(p) for p in partitions])
        return coordinator

    @functools.cached_property
    def _user_ids(self) -> npt.NDArray[np.int64]:
        known = self.user_map.user_ids
        return np.arange(1, self.settings.users + 1, dtype=np.int64) if known is None else known
