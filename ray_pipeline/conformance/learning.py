"""Identifiability: a learner that knows nothing of the model must find its factors, to the degree that the signal strength predicts.

The most active users and the most popular movies of the stream rate each other some times as often as it takes for the factors
to stand out from the noise at all. The learner is alternating least squares (Koren, Bell and Volinsky, IEEE Computer, 2009), after
biases.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Counted, Measure, Unchecked
from ray_pipeline.conformance.world import World
from ray_pipeline.events import HALF_STARS_MAX
from ray_pipeline.model.alias import AliasTable
from ray_pipeline.model.population import Movies, Users
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.truth.law import BiasOnly, RatingLaw

__all__ = ["learnable", "learned_factors"]

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_USERS, _MOVIES = 400, 300
_TRAIN_FEWEST, _TRAIN_MOST = 40_000, 1_000_000
_TEST = 80_000
_ABOVE_THRESHOLD = 15.0
_RANK_MOST = 40
_WITHIN_LEAST = 0.2  # share of the raw scores that ratings can say
_ROUNDS = 12
_PLAIN = {"taste_exposure": 0.0, "session_length": 1.0, "drift": (), "attack": ()}
"""All of them rate alike, and nothing happens meanwhile."""
_LEAST_SHARE, _MOST_SHARE = 0.5, 1.05
_TOLERANCE = 0.01  # stars²: what so few test ratings leave to chance


def learnable(evidence: Evidence) -> Measure:
    """Squared error that factors learned by ALS save beyond biases, stars², against what knowing them all would save.

    It must be at least half of that, and cannot be more.
    """
    source, declared = evidence.sample.source, evidence.declared
    rank = source.settings.rank
    if source.settings.factor_share == 0:
        return Unchecked("factor_share is 0: there is nothing to learn")
    law = NormalDist(source.settings.mean_rating, source.settings.rating_sd)
    if law.cdf(HALF_STARS_MAX / 2) - law.cdf(0.5) < _WITHIN_LEAST:
        return Unchecked("most scores are cut off at 0.5 or 5 stars: what they were cannot be learned")
    if rank > _RANK_MOST:
        return Unchecked(f"a short fit cannot find more than {_RANK_MOST} factors")
    ids = _frequent(source, declared)
    if min(len(each) for each in ids) < 2 * rank:
        return Unchecked("too few users or movies to learn factors from")
    train = _enough(source, len(ids[0]), len(ids[1]))
    if train > _TRAIN_MOST:
        return Unchecked(f"so weak a signal needs {train:,} ratings by {len(ids[0])} users to learn from")
    model = _dense(source, ids)
    drawn = model.draw(0, train + _TEST)
    user = np.searchsorted(model.users.user_ids, drawn.user_ids)
    movie = np.searchsorted(model.movies.movie_ids, drawn.movie_ids)
    stars = drawn.half_stars / 2.0
    biases, taste = learned_factors(user[:train], movie[:train], stars[:train], rank, _ridge(source))
    user, movie, actual = user[train:], movie[train:], stars[train:]
    by_bias, rest = biases[user, movie], taste[user, movie]
    saved = float(((actual - by_bias) ** 2 - (actual - by_bias - rest) ** 2).mean())
    predicted = _predicted(_dense(declared, ids), user, movie)
    return Counted(saved, predicted, (saved - _TOLERANCE) / _MOST_SHARE, (saved + _TOLERANCE) / _LEAST_SHARE)


def learned_factors(user: Ids, movie: Ids, stars: Floats, rank: int, ridge: float) -> tuple[Floats, Floats]:
    """Learn from ratings.

    Args:
        user: shape (n,), 0 … users - 1.
        movie: shape (n,), 0 … movies - 1.
        stars: shape (n,).
        rank: how many factors.
        ridge: variance of what factors do not explain over the variance of a factor.

    Returns:
        What mean and biases predict of every pair, shape (users, movies), and what the factors add to it.
    """
    shape = int(user.max()) + 1, int(movie.max()) + 1
    weight, total = np.zeros(shape), np.zeros(shape)
    np.add.at(weight, (user, movie), 1.0)
    np.add.at(total, (user, movie), stars)
    mean = stars.mean()
    biases = np.full(shape, mean)
    of_user, of_movie = np.zeros(shape[0]), np.zeros(shape[1])
    for _ in range(_ROUNDS):
        of_user = (total - weight * (mean + of_movie)).sum(axis=1) / (weight.sum(axis=1) + 1.0)
        of_movie = (total - weight * (mean + of_user[:, None])).sum(axis=0) / (weight.sum(axis=0) + 1.0)
    biases = mean + of_user[:, None] + of_movie
    residual = total - weight * biases
    ours = np.random.default_rng(0).normal(size=(shape[0], rank)) / np.sqrt(rank)
    for _ in range(_ROUNDS):
        theirs = _least_squares(weight.T, residual.T, ours, ridge)
        ours = _least_squares(weight, residual, theirs, ridge)
    return biases, ours @ theirs.T


def _least_squares(weight: Floats, residual: Floats, other: Floats, ridge: float) -> Floats:
    """Each row's own ridge regression on the other side's factors, shape (rows, rank)."""
    rank = other.shape[1]
    squares = (other[:, :, None] * other[:, None, :]).reshape(len(other), -1)
    normal = (weight @ squares).reshape(-1, rank, rank) + ridge * np.eye(rank)
    return np.asarray(np.linalg.solve(normal, (residual @ other)[:, :, None])[:, :, 0])


def _dense(world: World, ids: tuple[Ids, Ids]) -> ShardModel:
    """Some users and movies of a world as a shard of its own, in which each is as frequent as any other."""
    user, movie = world.user_at(ids[0]), world.catalogue.index_of(ids[1])
    flat_users, flat_movies = (AliasTable.from_weights(np.ones(len(at), np.int64)) for at in ids)
    habits = world.users.habits.of(user)
    users = Users(ids[0], world.users.factors[user], world.users.biases[user], flat_users, habits)
    movies = Movies(ids[1], world.movies.factors[movie], world.movies.biases[movie], flat_movies)
    return ShardModel(world.settings.model_copy(update=_PLAIN), world.settings.partitions, users, movies)


def _frequent(world: World, other: World) -> tuple[Ids, Ids]:
    """Ids of the most active users and the most popular movies that another world has too, ascending."""
    both = np.flatnonzero(other.user_at(world.users.user_ids) >= 0)
    user = both[np.argsort(-world.user_law[both], kind="stable")[:_USERS]]
    known = np.flatnonzero(other.catalogue.index_of(world.movies.movie_ids) >= 0)
    movie = known[np.argsort(-world.movie_law[known], kind="stable")[:_MOVIES]]
    return np.sort(world.users.user_ids[user]), np.sort(world.movies.movie_ids[movie])


def _predicted(model: ShardModel, user: Ids, movie: Ids) -> float:
    """What knowing everything but the noise saves over knowing the biases, stars², on average over some pairs."""
    expected = RatingLaw(model.noise_sd).moments(model.score(user, movie), model.users.habits.of(user)).mean
    return float(((expected - BiasOnly([model], [1.0]).predict(model, user, movie)) ** 2).mean())


def _noise(world: World) -> float:
    """Variance of what no factor explains, stars²."""
    # rounding to steps adds the variance of a uniform error
    step_squared = 0.25 + 0.75 * world.settings.whole_star_share
    return world.settings.rating_sd**2 * world.noise_share + step_squared / 12


def _ridge(world: World) -> float:
    """The ridge that is best for the signal strength: variance of the rest over the variance of one factor of one side."""
    settings = world.settings
    return float(_noise(world) / (settings.rating_sd * np.sqrt(settings.factor_share / settings.rank)))


def _enough(world: World, users: int, movies: int) -> int:
    """Ratings to learn from: some times as many as it takes for a factor's singular value to leave that of the noise.

    By the threshold of Baik, Ben Arous and Péché (Annals of Probability, 2005) for ratings spread evenly over users × movies.
    """
    settings = world.settings
    least = _noise(world) * settings.rank * np.sqrt(users * movies) / (settings.rating_sd**2 * settings.factor_share)
    return max(_TRAIN_FEWEST, int(_ABOVE_THRESHOLD * least))
