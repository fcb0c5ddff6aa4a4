"""Biases of users and movies, shrunk towards 0 by as much as the data calls for.

``rating = mean + user bias + movie bias + rest`` with normal biases: each bias is its posterior mean given the others,
``sum of residuals / (count + rest variance / bias variance)`` (Koren, Bell and Volinsky, 2009), and the three variances follow
from the biases found, as in the EM algorithm for random effects, so that nobody has to choose how strongly to regularise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.fitting.reading import Ratings

__all__ = ["Biases", "fit_biases"]

Floats = npt.NDArray[np.float64]

_SWEEPS = 12
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Biases:
    """Mean and biases, in stars.

    Attributes:
        mean: of the ratings.
        users: shape (users,).
        movies: shape (movies,).
    """

    mean: float
    users: Floats
    movies: Floats

    def predict(self, ratings: Ratings) -> Floats:
        """Mean and biases of each rating, shape (n,), stars."""
        return self.mean + self.users[ratings.user] + self.movies[ratings.movie]


def fit_biases(ratings: Ratings) -> Biases:
    """Mean and biases of some ratings; 0 for users and movies without any."""
    mean = float(ratings.half_stars.mean()) / 2
    stars = ratings.half_stars / 2.0 - mean
    users, movies = _Effect(ratings.user, len(ratings.user_ids)), _Effect(ratings.movie, len(ratings.movie_ids))
    noise = float(stars.var()) or _LEAST_VARIANCE
    for _ in range(_SWEEPS):
        movies.update(stars - users.of_each(), noise)
        users.update(stars - movies.of_each(), noise)
        noise = max(float(((stars - users.of_each() - movies.of_each()) ** 2).mean()), _LEAST_VARIANCE)
    return Biases(mean, users.biases, movies.biases)


class _Effect:
    """The biases of one side, and their variance."""

    def __init__(self, position: npt.NDArray[np.int32], n: int) -> None:
        self._position = position
        self._counts = np.bincount(position, minlength=n)
        self._variance = 0.1
        self.biases = np.zeros(n)

    def of_each(self) -> Floats:
        """The bias of each rating, shape (n,)."""
        return self.biases[self._position]

    def update(self, rest: Floats, noise: float) -> None:
        """New biases from what the other side leaves unexplained, shape (n,)."""
        damping = noise / self._variance
        self.biases = np.bincount(self._position, rest, len(self.biases)) / (self._counts + damping)
        there = self._counts > 0
        uncertainty = noise / (self._counts[there] + damping)
        self._variance = max(float((self.biases[there] ** 2 + uncertainty).mean()), _LEAST_VARIANCE)
