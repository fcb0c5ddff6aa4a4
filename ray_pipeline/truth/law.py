"""What a rating is expected to be: its exact law given the noise-free score, and what the biases alone can tell.

Nothing here is estimated from ratings: the model is known, so the best that any learner can reach is known too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.events import HALF_STARS_MAX
from ray_pipeline.model.alias import AliasTable
from ray_pipeline.model.population import Users
from ray_pipeline.model.ratings import ShardModel, to_half_stars
from ray_pipeline.model.streams import normal_table

__all__ = ["BiasOnly", "Moments", "RatingLaw", "probabilities"]

Floats = npt.NDArray[np.float64]

_BLOCK = 1 << 14  # ratings judged at a time; no effect on any value
_REACH = 10.0  # standard deviations that the tables of BiasOnly span
_GRID = 1024
_NODES = 256


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of ratings before they are drawn. Unit: stars.

    Attributes:
        mean: shape (n,): E[r], the prediction with the least expected squared error.
        variance: shape (n,): Var[r], that least squared error.
        deviation: shape (n,): E|r - median of r|, the least absolute error that any prediction can expect.
    """

    mean: Floats
    variance: Floats
    deviation: Floats


class RatingLaw:
    """The law of a rating given its noise-free score, exact to the last of the 65,536 equally likely noises.

    A rating is at least at a level (of 1 … 10 half stars, or 2, 4 … 10 when stars are whole) when score plus noise, added in
    float32 as the model does, reaches the level's edge. Where users have scales, the noise is looked up in units of the user's
    own, which may miss one of the 65,536.

    Args:
        noise_sd: standard deviation of the noise, stars.
        step: 0.5 or 1: what ratings are rounded to.

    Attributes:
        levels: the ratings there are, in half stars, ascending.
    """

    def __init__(self, noise_sd: np.float32, step: float = 0.5) -> None:
        self._noise = (noise_sd * normal_table()).astype(np.float64)
        self.levels = _levels(step)
        self._edges = [_edge(level, step) for level in self.levels[1:]]

    def at_least(self, scores: npt.NDArray[np.float32], scales: npt.NDArray[np.float32] | None = None) -> Floats:
        """P(at least each level but the lowest).

        Args:
            scores: shape (n,), float32, stars, noise-free.
            scales: shape (n,), float32, > 0: what the noise is times; None = 1.

        Returns:
            Shape (n, levels - 1), descending along the second axis.
        """
        order = np.argsort(scores)  # neighbours look up the same places: thrice as fast
        exact = scores[order].astype(np.float64)
        scale = None if scales is None else scales[order].astype(np.float64)
        found = np.empty((len(self._edges), len(scores)))
        for row, (edge, ties_reach) in enumerate(self._edges):
            bar = edge - exact if scale is None else (edge - exact) / scale
            found[row, order] = np.searchsorted(self._noise, bar, "left" if ties_reach else "right")
        return (1.0 - found / len(self._noise)).T

    def moments(self, scores: npt.NDArray[np.float32], scales: npt.NDArray[np.float32] | None = None) -> Moments:
        """Mean, variance and least absolute error of the rating that each noise-free score, shape (n,), leads to."""
        made = [
            self._moments(scores[lo : lo + _BLOCK], None if scales is None else scales[lo : lo + _BLOCK])
            for lo in range(0, max(1, len(scores)), _BLOCK)
        ]
        return Moments(
            np.concatenate([m.mean for m in made]),
            np.concatenate([m.variance for m in made]),
            np.concatenate([m.deviation for m in made]),
        )

    def _moments(self, scores: npt.NDArray[np.float32], scales: npt.NDArray[np.float32] | None) -> Moments:
        reach, levels = self.at_least(scores, scales), np.array(self.levels, np.float64)
        half_stars = levels[0] + reach @ np.diff(levels)
        squares = levels[0] ** 2 + reach @ np.diff(levels**2)
        # a level lies above the median where less than half of the probability reaches it
        deviation = np.minimum(reach, 1.0 - reach) @ np.diff(levels)
        return Moments(half_stars / 2, np.maximum(squares - half_stars**2, 0.0) / 4, deviation / 2)


class BiasOnly:
    """The best prediction that knows everything but how tastes meet: additive in user and movie.

    Of U·V a learner of biases still gets what is the same for all movies or all users. So the factors are centred on their
    means over the stream, U·V = (U - Ū)·(V - V̄) + U·V̄ + Ū·(V - V̄): the last two belong to user and movie, and only the first
    is out of reach. Its variance under the stream's law of users and movies is exact; its law is taken to be that of a sum
    of products of normals of that variance, which it is exactly for many users and movies. The prediction is E[r] over it
    and the noise, with rounding and clipping. Where users have scales, each user's own is known too.

    The law of users and movies is that of a stream in which everybody has joined, nobody attacks, and popularity alone decides.

    Args:
        models: every shard's model; all have the same movies.
        shares: each shard's share of all ratings, in the same order.
    """

    def __init__(self, models: Iterable[ShardModel], shares: Iterable[float]) -> None:
        shards = list(zip(models, shares, strict=True))
        first = shards[0][0]
        movies = first.movies
        rank = movies.factors.shape[1]
        movie_mean, movie_spread = _centre([(movies.factors, probabilities(movies.popularity))])
        users = [(_unscaled(m.users), s * probabilities(m.users.activity)) for m, s in shards]
        user_mean, user_spread = _centre(users)
        self._movie_mean = movie_mean
        self._movies = movies.biases + (movies.factors - movie_mean) @ user_mean
        self._levels = _levels(first.step)
        self._edges = np.array([edge for edge, _ in (_edge(level, first.step) for level in self._levels[1:])])
        variance = float((movie_spread * user_spread).sum())
        self._make_table(variance, rank, float(first.noise_sd))

    def predict(
        self,
        model: ShardModel,
        user: npt.NDArray[np.int64],
        movie: npt.NDArray[np.int64],
        drift: npt.NDArray[np.float32] | float = 0.0,
    ) -> Floats:
        """The prediction for each pair, stars.

        Args:
            model: the shard the users belong to.
            user: shape (n,), positions in ``model.users``.
            movie: shape (n,), positions in ``model.movies``.
            drift: shape (n,), stars: what drift adds to each score.
        """
        users = model.users.biases[user] + model.users.factors[user] @ self._movie_mean
        if model.users.scales is None:
            return np.asarray(np.interp(users + self._movies[movie] + drift, self._scores, self._expected))
        scale = model.users.scales[user].astype(np.float64)
        return self._expect(users + scale * self._movies[movie] + drift, scale)

    def _expect(self, scores: Floats, scale: Floats | float = 1.0) -> Floats:
        """E[r] for each additive score: the rest is symmetric about 0, so P(score + rest ≥ edge) = P(rest ≤ score - edge)."""
        reached = [np.interp((scores - edge) / scale, self._offsets, self._law) for edge in self._edges]
        return np.asarray((self._levels[0] + np.diff(self._levels) @ np.array(reached)) / 2)

    def _make_table(self, variance: float, rank: int, noise_sd: float) -> None:
        """The law of the rest, and E[r] by additive score: what lies between the knots is interpolated."""
        spread = max(1e-6, np.sqrt(variance + noise_sd**2))
        self._offsets = np.linspace(-_REACH * spread, _REACH * spread, _GRID * 2 + 1)
        # a sum of `rank` products of normals is a normal whose standard deviation is itself the length of a normal vector
        length = (np.arange(_NODES) + 0.5) * ((np.sqrt(rank) + 8.0) / _NODES)
        weight = np.exp((rank - 1) * np.log(length / np.sqrt(rank)) - (length**2 - rank) / 2)
        deviation = np.maximum(np.sqrt(variance / rank * length**2 + noise_sd**2), 1e-9)
        table = normal_table().astype(np.float64)
        below = np.searchsorted(table, self._offsets[:, None] / deviation)
        self._law = below @ (weight / weight.sum()) / len(table)
        reach = self._offsets[-1]
        self._scores = np.linspace(self._edges[0] - reach, self._edges[-1] + reach, 4 * _GRID + 1)
        self._expected = self._expect(self._scores)


def probabilities(table: AliasTable) -> Floats:
    """Probability of each item of an alias table, shape (n,)."""
    keep = table.threshold / 2.0**32
    kept = keep + np.bincount(table.alias, 1.0 - keep, len(table))
    return np.asarray(kept / len(table), np.float64)


def _centre(parts: list[tuple[npt.NDArray[np.float32], Floats]]) -> tuple[Floats, Floats]:
    """Weighted mean, shape (rank,), and covariance, shape (rank, rank), of factors in parts; the weights sum to 1."""
    rank = parts[0][0].shape[1]
    mean, second = np.zeros(rank), np.zeros((rank, rank))
    for factors, weights in parts:
        for lo in range(0, len(factors), _BLOCK):
            block, weight = factors[lo : lo + _BLOCK].astype(np.float64), weights[lo : lo + _BLOCK]
            mean += weight @ block
            second += (block.T * weight) @ block
    return mean, second - np.outer(mean, mean)


def _unscaled(users: Users) -> npt.NDArray[np.float32]:
    return users.factors if users.scales is None else users.factors / users.scales[:, None]


def _levels(step: float) -> list[int]:
    """The ratings there are, in half stars, ascending."""
    return list(range(round(step * 2), HALF_STARS_MAX + 1, round(step * 2)))


def _edge(half_stars: int, step: float) -> tuple[float, bool]:
    """Which exact sums of score and noise are rounded, in float32, to a score of at least so many half stars.

    Returns:
        The edge, in float64, and whether a sum right on it reaches (a tie goes to the even neighbour).
    """
    least = np.float32((half_stars - step) / 2)
    down, up = np.float32(-np.inf), np.float32(np.inf)

    def reaches(score: np.float32) -> bool:
        return bool(to_half_stars(np.array([score], np.float32), step)[0] >= half_stars)

    while reaches(np.nextafter(least, down)):
        least = np.nextafter(least, down)
    while not reaches(least):
        least = np.nextafter(least, up)
    return (float(np.nextafter(least, down)) + float(least)) / 2, int(least.view(np.uint32)) % 2 == 0
