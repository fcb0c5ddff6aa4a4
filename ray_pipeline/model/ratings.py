"""Every rating as a pure function of (seed, configuration, partition, index)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.events import HALF_STARS_MAX, HALF_STARS_MIN
from ray_pipeline.model.faults import make_faults
from ray_pipeline.model.population import Movies, Users
from ray_pipeline.model.streams import normal_table, words

__all__ = ["Drawn", "Parts", "ShardModel"]

_BLOCK = 4096  # ratings scored at a time: what fits the second-level cache; no effect on any value
_NOISE_BITS = np.uint64(0xFFFF)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Ratings without their times.

    Attributes:
        user_ids: shape (n,), int64.
        movie_ids: shape (n,), int64.
        scores: shape (n,), float32, stars, before rounding and clipping, noise included.
        half_stars: shape (n,), uint8, 1 … 10.
    """

    user_ids: npt.NDArray[np.int64]
    movie_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    half_stars: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Parts:
    """What one score is made of, in stars.

    Attributes:
        user_factors: shape (rank,), float32, scaled so that the dot product is in stars.
        movie_factors: shape (rank,), float32.
        user_bias: the user's bias, without the mean rating.
        movie_bias: the movie's bias.
        dot_product: of the factors.
        noise: what no predictor can know.
        score: mean rating, biases, dot product and noise together.
    """

    user_factors: npt.NDArray[np.float32]
    movie_factors: npt.NDArray[np.float32]
    user_bias: float
    movie_bias: float
    dot_product: float
    noise: float
    score: float

    @property
    def nearest_half_star(self) -> float:
        """The score rounded to half stars, ties upwards, before it is clipped to 0.5 … 5.0."""
        return math.floor(self.score * 2 + 0.5) / 2


class ShardModel:
    """The ratings of one shard, by index.

    Args:
        settings: the event settings are used.
        partition: the shard.
        users: the shard's own users.
        movies: all movies.

    Attributes:
        faults: what is wrong with its records, on purpose; None = nothing.
        noise_sd: float32, standard deviation of the noise, stars: times an entry of :func:`normal_table`, each equally likely.
    """

    def __init__(self, settings: Settings, partition: int, users: Users, movies: Movies) -> None:
        self.partition = partition
        self.users = users
        self.movies = movies
        self.faults = make_faults(settings, partition)
        self._seed = settings.seed
        shares = settings.user_bias_share + settings.movie_bias_share + settings.factor_share
        self._mean = settings.mean_rating
        self.noise_sd = np.float32(settings.rating_sd * math.sqrt(max(0.0, 1.0 - shares)))

    def draw(self, first: int, count: int) -> Drawn:
        """Ratings ``first … first + count - 1``.

        Counter n of the shard's stream makes rating n: word 0 its user, word 1 its movie, 16 bits of word 2 its noise.

        Args:
            first: index of the first rating, ≥ 0.
            count: how many, ≥ 0.
        """
        drawn = words(self._seed, "events", self.partition, first, count)
        user = self.users.activity.draw(drawn[:, 0])
        movie = self.movies.popularity.draw(drawn[:, 1])
        noise = normal_table()[drawn[:, 2] & _NOISE_BITS]
        scores = self.score(user, movie)
        scores += self.noise_sd * noise
        return Drawn(self.users.user_ids[user], self.movies.movie_ids[movie], scores, to_half_stars(scores))

    def parts(self, index: int) -> Parts:
        """What the score of one rating is made of."""
        drawn = words(self._seed, "events", self.partition, index, 1)
        user, movie = self.users.activity.draw(drawn[:, 0]), self.movies.popularity.draw(drawn[:, 1])
        noise = self.noise_sd * normal_table()[drawn[:, 2] & _NOISE_BITS]
        ours, theirs = self.users.factors[user][0], self.movies.factors[movie][0]
        return Parts(
            ours,
            theirs,
            float(self.users.biases[user][0]) - self._mean,
            float(self.movies.biases[movie][0]),
            float(np.dot(ours, theirs)),
            float(noise[0]),
            float((self.score(user, movie) + noise)[0]),
        )

    def score(self, user: npt.NDArray[np.int64], movie: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Scores without noise, in stars, before rounding and clipping.

        Added rank by rank, so that every CPU rounds alike; BLAS and einsum do not.

        Args:
            user: shape (n,), positions in ``users.user_ids``.
            movie: shape (n,), positions in ``movies.movie_ids``.

        Returns:
            Shape (n,), float32.
        """
        scores = np.empty(len(user), np.float32)
        for lo in range(0, len(user), _BLOCK):
            part = slice(lo, lo + _BLOCK)
            product = self.users.factors[user[part]] * self.movies.factors[movie[part]]
            score = self.users.biases[user[part]] + self.movies.biases[movie[part]]
            for column in range(product.shape[1]):
                score += product[:, column]
            scores[part] = score
        return scores


def to_half_stars(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Round to the nearest half star, ties upwards, and clip to 0.5 … 5.0.

    Args:
        scores: shape (n,), float32, stars.

    Returns:
        Shape (n,), uint8, half stars, 1 … 10.
    """
    rounded = np.floor(scores * np.float32(2.0) + np.float32(0.5))
    return np.asarray(np.clip(rounded, HALF_STARS_MIN, HALF_STARS_MAX), np.uint8)
