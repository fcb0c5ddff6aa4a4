"""What a rating is expected to be: its exact law given the noise-free score, and what the biases alone can tell.

Nothing here is estimated from ratings: the model is known, so the best that any learner can reach is known too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.events import HALF_STARS_MAX, HALF_STARS_MIN
from ray_pipeline.model.alias import AliasTable
from ray_pipeline.model.population import Habits, Users
from ray_pipeline.model.ratings import ShardModel, to_half_stars
from ray_pipeline.model.streams import normal_table

__all__ = ["BiasOnly", "Moments", "RatingLaw", "probabilities"]

Floats = npt.NDArray[np.float64]

_LEVELS = np.arange(HALF_STARS_MIN, HALF_STARS_MAX + 1, dtype=np.float64)
_ALIKE = Habits()
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

    A rating is at least at a level (of 1 … 10 half stars; whoever gives whole stars is at two of them at once) when score plus
    noise, added in float32 as the model does, reaches the level's edge. Where users have scales, the noise is looked up in units
    of the user's own, which may miss one of the 65,536.

    Args:
        noise_sd: standard deviation of the noise, stars.
    """

    def __init__(self, noise_sd: np.float32) -> None:
        self._noise = (noise_sd * normal_table()).astype(np.float64)

    def at_least(self, scores: npt.NDArray[np.float32], habits: Habits = _ALIKE) -> Floats:
        """P(at least each of 2 … 10 half stars).

        Args:
            scores: shape (n,), float32, stars, noise-free.
            habits: of n users: what each one's noise is times, and who gives whole stars only.

        Returns:
            Shape (n, 9), descending along the second axis.
        """
        if habits.whole is None:
            return self._reach(scores, habits.scales, whole=False)
        found = np.empty((len(scores), len(_LEVELS) - 1))
        for kind in (False, True):
            rows = np.flatnonzero(habits.whole == kind)
            found[rows] = self._reach(scores[rows], habits.of(rows).scales, kind)
        return found

    def _reach(self, scores: npt.NDArray[np.float32], scales: npt.NDArray[np.float32] | None, whole: bool) -> Floats:
        order = np.argsort(scores)  # neighbours look up the same places: thrice as fast
        exact = scores[order].astype(np.float64)
        scale = None if scales is None else scales[order].astype(np.float64)
        edges = _edges(whole=whole)
        found = np.empty((len(edges), len(scores)))
        for row, (edge, ties_reach) in enumerate(edges):
            if row and edges[row - 1][0] == edge:
                found[row] = found[row - 1]
                continue
            bar = edge - exact if scale is None else (edge - exact) / scale
            found[row, order] = np.searchsorted(self._noise, bar, "left" if ties_reach else "right")
        return (1.0 - found / len(self._noise)).T

    def moments(self, scores: npt.NDArray[np.float32], habits: Habits = _ALIKE) -> Moments:
        """Mean, variance and least absolute error of the rating that each noise-free score, shape (n,), leads to."""
        made = [
            self._moments(scores[lo : lo + _BLOCK], habits.of(slice(lo, lo + _BLOCK)))
            for lo in range(0, max(1, len(scores)), _BLOCK)
        ]
        return Moments(
            np.concatenate([m.mean for m in made]),
            np.concatenate([m.variance for m in made]),
            np.concatenate([m.deviation for m in made]),
        )

    def _moments(self, scores: npt.NDArray[np.float32], habits: Habits) -> Moments:
        reach = self.at_least(scores, habits)
        half_stars = _LEVELS[0] + reach @ np.diff(_LEVELS)
        squares = _LEVELS[0] ** 2 + reach @ np.diff(_LEVELS**2)
        # a level lies above the median where less than half of the probability reaches it
        deviation = np.minimum(reach, 1.0 - reach) @ np.diff(_LEVELS)
        return Moments(half_stars / 2, np.maximum(squares - half_stars**2, 0.0) / 4, deviation / 2)


class BiasOnly:
    """The best prediction that knows everything but how tastes meet: additive in user and movie.

    Of U·V a learner of biases still gets what is the same for all movies or all users. So the factors are centred on their
    means over the stream, U·V = (U - Ū)·(V - V̄) + U·V̄ + Ū·(V - V̄): the last two belong to user and movie, and only the first
    is out of reach. Its variance under the stream's law of users and movies is exact; its law is taken to be that of a sum
    of products of normals of that variance, which it is exactly for many users and movies. The prediction is E[r] over it
    and the noise, with rounding and clipping. Each user's habits are known too: the scale, and whether stars are whole.

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
        habits = model.users.habits.of(user)
        scale = 1.0 if habits.scales is None else habits.scales.astype(np.float64)
        scores = users + scale * self._movies[movie] + drift
        by_half = self._predicted(scores, scale, whole=False)
        if habits.whole is None:
            return by_half
        return np.where(habits.whole, self._predicted(scores, scale, whole=True), by_half)

    def _predicted(self, scores: Floats, scale: Floats | float, whole: bool) -> Floats:
        if isinstance(scale, float):
            return np.asarray(np.interp(scores, self._scores, self._expected[whole]))
        return self._expect(scores, whole, scale)

    def _expect(self, scores: Floats, whole: bool, scale: Floats | float = 1.0) -> Floats:
        """E[r] for each additive score: the rest is symmetric about 0, so P(score + rest ≥ edge) = P(rest ≤ score - edge)."""
        reached = [np.interp((scores - edge) / scale, self._offsets, self._law) for edge, _ in _edges(whole=whole)]
        return np.asarray((_LEVELS[0] + np.diff(_LEVELS) @ np.array(reached)) / 2)

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
        edges = [edge for edge, _ in _edges(whole=False)]
        self._scores = np.linspace(edges[0] - reach, edges[-1] + reach, 4 * _GRID + 1)
        self._expected = {whole: self._expect(self._scores, whole) for whole in (False, True)}


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
    scales = users.habits.scales
    return users.factors if scales is None else users.factors / scales[:, None]


@functools.cache
def _edges(*, whole: bool) -> list[tuple[float, bool]]:
    """The edges of 2 … 10 half stars, for who gives half stars, or whole ones only; see :func:`_edge`."""
    return [_edge(level, whole) for level in range(HALF_STARS_MIN + 1, HALF_STARS_MAX + 1)]


def _edge(half_stars: int, whole: bool) -> tuple[float, bool]:
    """Which exact sums of score and noise are rounded, in float32, to a score of at least so many half stars.

    Returns:
        The edge, in float64, and whether a sum right on it reaches (a tie goes to the even neighbour).
    """
    if whole and half_stars <= 2:
        return -np.inf, True
    least = np.float32((half_stars + half_stars % 2 - 1.0 if whole else half_stars - 0.5) / 2)
    down, up = np.float32(-np.inf), np.float32(np.inf)

    def reaches(score: np.float32) -> bool:
        return bool(to_half_stars(np.array([score], np.float32), np.array([whole]))[0] >= half_stars)

    while reaches(np.nextafter(least, down)):
        least = np.nextafter(least, down)
    while not reaches(least):
        least = np.nextafter(least, up)
    return (float(np.nextafter(least, down)) + float(least)) / 2, int(least.view(np.uint32)) % 2 == 0
