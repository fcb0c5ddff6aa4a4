"""Users and movies: biases, latent factors, activity and popularity, each a pure function of (seed, id), or of a model file and the id.

A score is ``mean + user bias + movie bias + U·V + noise``; the four random terms have the shares of variance that the settings
name and together the standard deviation ``rating_sd``. With ``user_scale_sigma`` all but the first two are times the user's
scale, whose mean square is 1. This is the biased matrix-factorisation model of Koren, Bell and Volinsky, "Matrix Factorization
Techniques for Recommender Systems" (IEEE Computer, 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.fitted import load_fitted
from ray_pipeline.model.alias import AliasTable
from ray_pipeline.model.arrival import Arrivals, arrivals
from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.model.genres import with_genres
from ray_pipeline.model.partitioner import partition_of
from ray_pipeline.model.scopes import attacked_movies, drifting_movies
from ray_pipeline.model.streams import (
    dense_ranges,
    halfwords,
    halfwords_of,
    lognormal_scales,
    lognormal_weights,
    normal_table,
)

__all__ = ["Habits", "Movies", "UserMap", "Users", "build_movies", "build_user_map", "build_users", "movie_factors"]

_CHUNK = 1 << 17
_POPULARITY_UNIT = 2**34


@dataclass(frozen=True, slots=True)
class Movies:
    """What a shard must know of all movies; the same for every shard, so a node keeps one copy.

    Attributes:
        movie_ids: shape (n,), int64, ascending.
        factors: shape (n, rank), float32, standard normal; of variance 1 in a fitted model.
        biases: shape (n,), float32, stars.
        popularity: the law of the movie of a rating, by position in ``movie_ids``.
        arrivals: which movies join during the run; None = none does.
        drifting: for each drift, shape (n,), the movies it is about; None where it is not about some movies.
        attacked: for each attack, the place of its movie.
    """

    movie_ids: npt.NDArray[np.int64]
    factors: npt.NDArray[np.float32]
    biases: npt.NDArray[np.float32]
    popularity: AliasTable
    arrivals: Arrivals | None = None
    drifting: tuple[npt.NDArray[np.bool_] | None, ...] = ()
    attacked: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Habits:
    """How some users give stars, or the users of some ratings.

    Attributes:
        scales: shape (n,), float32, > 0: how widely each uses the stars; None = all alike.
        whole: shape (n,), bool: who gives whole stars only; None = nobody does.
    """

    scales: npt.NDArray[np.float32] | None = None
    whole: npt.NDArray[np.bool_] | None = None

    def of(self, chosen: npt.NDArray[np.int64] | slice) -> Habits:
        """Those of some of them, by place."""
        scales = None if self.scales is None else self.scales[chosen]
        return Habits(scales, None if self.whole is None else self.whole[chosen])


@dataclass(frozen=True, slots=True)
class Users:
    """The users of one shard.

    Attributes:
        user_ids: shape (n,), int64, ascending.
        factors: shape (n, rank), float32, scaled so that ``U·V`` is in stars; times the user's scale.
        biases: shape (n,), float32, stars, the mean rating included.
        activity: the law of the user of a rating, by position in ``user_ids``.
        habits: how each gives stars.
        arrivals: which users join during the run; None = none does.
    """

    user_ids: npt.NDArray[np.int64]
    factors: npt.NDArray[np.float32]
    biases: npt.NDArray[np.float32]
    activity: AliasTable
    habits: Habits = Habits()
    arrivals: Arrivals | None = None


@dataclass(frozen=True, slots=True)
class UserMap:
    """Who belongs to which shard.

    Attributes:
        partition: shape (users,), int32: the partition of each user.
        activity: shape (partitions,), int64: summed activity of each partition's users.
        user_ids: shape (users,), int64, ascending; None where they are 1 … users.
    """

    partition: npt.NDArray[np.int32]
    activity: npt.NDArray[np.int64]
    user_ids: npt.NDArray[np.int64] | None = None

    def share(self, partition: int) -> float:
        """Share of all ratings that fall to a partition, 0 … 1."""
        return int(self.activity[partition]) / int(self.activity.sum())

    def users_of(self, partition: int) -> npt.NDArray[np.int64]:
        """Ids of a partition's users, ascending."""
        mine = np.flatnonzero(self.partition == partition)
        return mine.astype(np.int64) + 1 if self.user_ids is None else self.user_ids[mine]


def build_user_map(settings: Settings) -> UserMap:
    """Assign every user to its partition and sum the activity of each."""
    partition = np.empty(settings.users, np.int32)
    activity = np.zeros(settings.partitions, np.int64)
    user_ids = None if settings.model is None else load_fitted(settings.model).users.ids
    for first in range(0, settings.users, _CHUNK):
        last = min(first + _CHUNK, settings.users)
        ids = np.arange(first, last, dtype=np.int64) + 1 if user_ids is None else user_ids[first:last]
        chosen = partition_of(ids, settings.partitions)
        partition[first : first + len(ids)] = chosen
        np.add.at(activity, chosen, _activity(settings, ids))
    return UserMap(partition, activity, user_ids)


def build_users(settings: Settings, user_ids: npt.NDArray[np.int64]) -> Users:
    """Factors, biases and activity of some users.

    Args:
        settings: the event settings are used.
        user_ids: shape (n,), int64, ascending, n ≥ 1.
    """
    scale = np.float32(settings.rating_sd * math.sqrt(settings.factor_share / settings.rank))
    bias = np.float32(settings.rating_sd * math.sqrt(settings.user_bias_share))
    mean = np.float32(settings.mean_rating)
    if settings.model is not None:
        model = load_fitted(settings.model)
        fitted, at = model.users, model.users.at(user_ids)
        factors, biases = fitted.factors[at] * scale, mean + fitted.biases[at] * bias
        return _with_habits(settings, user_ids, factors, biases, model.whole_stars[at])
    factors = np.empty((len(user_ids), settings.rank), np.float32)
    biases = np.empty(len(user_ids), np.float32)
    for lo, hi in dense_ranges(user_ids):
        ids = user_ids[lo:hi]
        factors[lo:hi] = _normals(settings, "user/factors", ids, settings.rank) * scale
        biases[lo:hi] = mean + _normals(settings, "user/bias", ids, 1)[:, 0] * bias
    return _with_habits(settings, user_ids, factors, biases, np.float32(settings.whole_star_share))


def _with_habits(
    settings: Settings,
    user_ids: npt.NDArray[np.int64],
    factors: npt.NDArray[np.float32],
    biases: npt.NDArray[np.float32],
    whole_stars: npt.NDArray[np.float32] | np.float32,
) -> Users:
    """Users of these tastes, each with a scale, a chance to give whole stars only, activity, and a time of joining."""
    scales = whole = None
    if settings.user_scale_sigma:
        scales = lognormal_scales(settings.user_scale_sigma)[
            halfwords_of(settings.seed, "user/scale", user_ids, 1)[:, 0]
        ]
        factors *= scales[:, None]
    if np.any(whole_stars):
        drawn = halfwords_of(settings.seed, "user/whole-stars", user_ids, 2).astype(np.int64)
        whole = (drawn[:, 0] << 16 | drawn[:, 1]) < whole_stars * 2.0**32
    activity, joining = AliasTable.scaled(_activity(settings, user_ids)), None
    if settings.new_user_share:
        share, until = settings.new_user_share, settings.arrival_ratings
        joining = arrivals(settings.seed, "user/arrival", user_ids, activity, share, until)
    return Users(user_ids, factors, biases, AliasTable.from_weights(activity), Habits(scales, whole), joining)


def movie_factors(
    settings: Settings, movie_ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Factors, shape (n, rank), and biases, shape (n,), of some movies.

    Args:
        settings: the event settings are used.
        movie_ids: shape (n,), int64, ascending.
    """
    bias = np.float32(settings.rating_sd * math.sqrt(settings.movie_bias_share))
    if settings.model is not None:
        fitted = load_fitted(settings.model).movies
        at = fitted.at(movie_ids)
        return fitted.factors[at], fitted.biases[at] * bias
    factors = np.empty((len(movie_ids), settings.rank), np.float32)
    biases = np.empty(len(movie_ids), np.float32)
    for lo, hi in dense_ranges(movie_ids):
        factors[lo:hi] = _normals(settings, "movie/factors", movie_ids[lo:hi], settings.rank)
        biases[lo:hi] = _normals(settings, "movie/bias", movie_ids[lo:hi], 1)[:, 0] * bias
    return factors, biases


def build_movies(
    settings: Settings,
    catalogue: Catalogue,
    parts: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] | None = None,
) -> Movies:
    """All movies.

    Args:
        settings: the event settings are used.
        catalogue: gives the ids and, if that matters, the genres.
        parts: results of :func:`movie_factors` for consecutive runs of the catalogue, made elsewhere; None = make them here.

    Raises:
        ConfigurationError: drift or attack name what the catalogue does not have.
    """
    made = [movie_factors(settings, catalogue.movie_ids)] if parts is None else parts
    factors = made[0][0] if len(made) == 1 else np.concatenate([part[0] for part in made])
    biases = made[0][1] if len(made) == 1 else np.concatenate([part[1] for part in made])
    if settings.genre_share:
        factors = with_genres(factors, catalogue, settings.seed, settings.genre_share)
    drifting, attacked = drifting_movies(settings, catalogue), attacked_movies(settings, catalogue)
    weights, joining = _popularity(settings, len(catalogue)), None
    if settings.new_movie_share:
        always = np.zeros(len(catalogue), np.bool_)
        always[list(attacked)] = True  # whoever bombs a movie that is not there yet would have to wait
        share, until = settings.new_movie_share, settings.arrival_ratings
        joining = arrivals(settings.seed, "movie/arrival", catalogue.movie_ids, weights, share, until, always)
    popularity = AliasTable.from_weights(weights)
    return Movies(catalogue.movie_ids, factors, biases, popularity, joining, drifting, attacked)


def _popularity(settings: Settings, count: int) -> npt.NDArray[np.int64]:
    """Zipf's law, P(rank k) ∝ k^-s, over a random ranking of the movies; of a fitted model, the law of its counts."""
    if settings.model is not None:
        return load_fitted(settings.model).movies.counts
    draws = halfwords(settings.seed, "movie/ranking", 0, count * 4).reshape(count, 4).astype(np.uint64)
    keys = draws[:, 0] | draws[:, 1] << np.uint64(16) | draws[:, 2] << np.uint64(32) | draws[:, 3] << np.uint64(48)
    order = np.argsort(keys, kind="stable")
    by_rank = [
        max(1, round(_POPULARITY_UNIT * math.pow(k, -settings.popularity_exponent))) for k in range(1, count + 1)
    ]
    # n · sum must stay below 2^63; a flat law over many movies has the greatest sum
    shift = max(0, (sum(by_rank) * count).bit_length() - 62)
    weights = np.empty(count, np.int64)
    weights[order] = np.maximum(np.array(by_rank, np.int64) >> shift, 1)
    return weights


def _activity(settings: Settings, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if settings.model is not None:
        fitted = load_fitted(settings.model).users
        return fitted.counts[fitted.at(ids)]
    return lognormal_weights(settings.activity_sigma)[halfwords_of(settings.seed, "user/activity", ids, 1)[:, 0]]


def _normals(settings: Settings, name: str, ids: npt.NDArray[np.int64], each: int) -> npt.NDArray[np.float32]:
    return normal_table()[halfwords_of(settings.seed, name, ids, each)]
