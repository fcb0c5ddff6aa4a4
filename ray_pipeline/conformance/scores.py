"""Mean, spread and shares of variance, estimated from rounded and clipped ratings.

Users, movies and factors of a seed are known, so a rating is an interval of ``mean + a·user + b·movie + c·taste + noise`` whose four
scales are not. Where users have scales of their own, or scores drift, both sides are divided by the scale, and the drift is
taken off the interval. Maximum likelihood for normal noise; with 1/σ and coefficient/σ as parameters the likelihood has one maximum
(Burridge, "A note on maximum likelihood estimation for regression models using grouped data", JRSS B, 1981).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from ray_pipeline.conformance.measure import Estimate
from ray_pipeline.events import HALF_STARS_MAX
from ray_pipeline.model.population import Habits, Movies, Users

__all__ = ["Intervals", "ScoreFit", "Terms", "fit_scores"]

Floats = npt.NDArray[np.float64]

_FEWEST = 1_000
_DIFFERING_FEWEST = 30
_WARM_UP = 20_000
_STEPS_MOST = 60
_TINY = 1e-300
_CONDITION_MOST = 1e8
_STEEPEST = 50.0  # a noise of 0.02 stars: below it, ratings of half stars do not tell noise from none


@dataclass(frozen=True, slots=True)
class Terms:
    """What scores are sums of, unscaled.

    Attributes:
        design: shape (n, 4): 1, user bias, movie bias, taste; each of variance 1 over users and movies.
    """

    design: Floats

    @classmethod
    def of(cls, users: Users, movies: Movies, user: npt.NDArray[np.int64], movie: npt.NDArray[np.int64]) -> Terms:
        """The terms of some ratings, by position of user and movie in a world of unit scales."""
        design = np.ones((len(user), 4))
        design[:, 1] = users.biases[user]
        design[:, 2] = movies.biases[movie]
        taste = np.zeros(len(user), np.float32)
        for column in range(users.factors.shape[1]):
            taste += users.factors[:, column][user] * movies.factors[:, column][movie]
        design[:, 3] = taste
        scales = users.habits.scales
        if scales is not None:
            scale = scales[user].astype(np.float64)
            for column in (0, 1, 3):  # the movie's bias is times the scale, as the noise is
                design[:, column] /= scale
        return cls(design)


@dataclass(frozen=True, slots=True)
class Intervals:
    """Between which scores each rating lies.

    Attributes:
        low: shape (n,), stars.
        high: shape (n,), stars.
        lowest: shape (n,): there is no lower rating, so the interval is open.
        highest: shape (n,): there is no higher one.
    """

    low: Floats
    high: Floats
    lowest: npt.NDArray[np.bool_]
    highest: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.low)

    def every(self, step: int) -> Intervals:
        """Every so manieth of them."""
        return Intervals(self.low[::step], self.high[::step], self.lowest[::step], self.highest[::step])

    @property
    def middle(self) -> Floats:
        """Shape (n,), stars."""
        return (self.low + self.high) / 2

    @classmethod
    def of(
        cls,
        half_stars: npt.NDArray[np.uint8],
        drift: npt.NDArray[np.float32],
        habits: Habits,
    ) -> Intervals:
        """From ratings, and each one's drift, shape (n,), and user's habits."""
        step = 0.5 if habits.whole is None else np.where(habits.whole, 1.0, 0.5)
        low, high = (half_stars - step) / 2 - drift, (half_stars + step) / 2 - drift
        if habits.scales is not None:
            low, high = low / habits.scales, high / habits.scales
        return cls(low, high, half_stars <= 2 * step, half_stars >= HALF_STARS_MAX)


@dataclass(frozen=True, slots=True)
class ScoreFit:
    """The scales that the ratings show.

    Attributes:
        scales: shape (5,), stars: mean, user bias, movie bias, taste, noise.
        covariance: shape (5, 5), of their errors.
        slope: shape (n,): derivative of each rating's log-likelihood by its score.
        weight: shape (n,): minus the second one.
    """

    scales: Floats
    covariance: Floats
    slope: Floats
    weight: Floats

    def mean(self, declared: float) -> Estimate:
        """The mean of the raw score, stars."""
        return Estimate(float(self.scales[0]), float(np.sqrt(self.covariance[0, 0])), declared)

    def deviation(self, declared: float) -> Estimate:
        """The standard deviation of the raw score, stars."""
        total = float(np.sqrt((self.scales[1:] ** 2).sum()))
        gradient = np.append(0.0, self.scales[1:] / total)
        return Estimate(total, self._error(gradient), declared)

    def share(self, term: int, declared: float) -> Estimate:
        """Share of variance of a term: 1 user bias, 2 movie bias, 3 taste, 4 noise."""
        variance = float((self.scales[1:] ** 2).sum())
        share = float(self.scales[term] ** 2) / variance
        gradient = np.append(0.0, -2.0 * self.scales[1:] * share / variance)
        gradient[term] += 2.0 * self.scales[term] / variance
        return Estimate(share, self._error(gradient), declared)

    def _error(self, gradient: Floats) -> float:
        return max(float(np.sqrt(gradient @ self.covariance @ gradient)), 1e-12)


def fit_scores(terms: Terms, ratings: Intervals) -> ScoreFit | None:
    """Maximum-likelihood scales of the terms; None where there are too few ratings, users or movies to tell them apart.

    Or where nearly all ratings are as one score makes them: then no term shows at all.
    """
    if len(ratings) < _FEWEST or np.linalg.cond(terms.design.T @ terms.design) > _CONDITION_MOST:
        return None
    every = max(1, len(ratings) // _WARM_UP)
    some, design = ratings.every(every), terms.design[::every]
    if _differing(design, some) < _DIFFERING_FEWEST > _differing(terms.design, ratings):
        return None
    beta, *_ = np.linalg.lstsq(design, some.middle, rcond=None)
    noise = max(float((some.middle - design @ beta).std()), 0.1)
    point = np.append(beta, 1.0) / noise
    point = _climb(design, some, point)
    point = _climb(terms.design, ratings, point)
    _, _, hessian, slope, weight = _likelihood(terms.design, ratings, point)
    gamma = point[4]
    scales = np.append(point[:4] / gamma, 1.0 / gamma)
    # d(coefficient, σ) / d(coefficient/σ, 1/σ)
    jacobian = np.diag(np.full(5, 1.0 / gamma))
    jacobian[:, 4] = -scales / gamma
    covariance = jacobian @ np.linalg.inv(-hessian) @ jacobian.T
    return ScoreFit(scales, covariance, slope * gamma, weight * gamma**2)


def _differing(design: Floats, ratings: Intervals) -> int:
    """How many ratings, at least, a score that is the same for all does not explain."""
    low = np.sort(np.where(ratings.lowest, -np.inf, ratings.low / design[:, 0]))
    high = np.sort(np.where(ratings.highest, np.inf, ratings.high / design[:, 0]))
    explained = np.arange(1, len(low) + 1) - np.searchsorted(high, low, "right")
    return len(low) - int(explained.max(initial=0))


def _climb(design: Floats, ratings: Intervals, point: Floats) -> Floats:
    """Newton's method with halved steps."""
    value, gradient, hessian, _, _ = _likelihood(design, ratings, point)
    for _ in range(_STEPS_MOST):
        step = np.linalg.lstsq(-hessian, gradient, rcond=None)[0]
        gain = float(gradient @ step)
        if gain < 1e-6 or point[4] > _STEEPEST:
            break
        while True:
            tried = point + step
            if tried[4] > 0:
                found = _likelihood(design, ratings, tried)
                if found[0] >= value - 1e-9:
                    break
            step = step / 2
        point, (value, gradient, hessian, _, _) = tried, found
    return point


def _likelihood(design: Floats, ratings: Intervals, point: Floats) -> tuple[float, Floats, Floats, Floats, Floats]:
    """Log-likelihood, gradient, Hessian, and of each rating the first and minus the second derivative by its score/σ."""
    score = design @ point[:4]
    lowest, highest, low_edge, high_edge = ratings.lowest, ratings.highest, ratings.low, ratings.high
    low = np.where(lowest, -np.inf, point[4] * low_edge - score)
    high = np.where(highest, np.inf, point[4] * high_edge - score)
    # of two far upper tails the difference is taken on the other side, where it is not lost
    swap = low > 0
    mass = np.where(swap, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
    mass = np.maximum(mass, _TINY)
    at_low, at_high = _density(low) / mass, _density(high) / mass
    low, high = np.where(lowest, 0.0, low), np.where(highest, 0.0, high)
    by_score = at_low - at_high
    edge_pull = high_edge * at_high - low_edge * at_low
    gradient = np.append(design.T @ by_score, edge_pull.sum())
    both = at_low * at_high
    high_high, low_low = -high * at_high - at_high**2, low * at_low - at_low**2
    by_score_twice = high_high + low_low + 2 * both
    by_both = -(high_edge * high_high + low_edge * low_low + (high_edge + low_edge) * both)
    hessian = np.empty((5, 5))
    hessian[:4, :4] = design.T @ (design * by_score_twice[:, None])
    hessian[:4, 4] = hessian[4, :4] = design.T @ by_both
    hessian[4, 4] = (high_edge**2 * high_high + low_edge**2 * low_low + 2 * high_edge * low_edge * both).sum()
    return float(np.log(mass).sum()), gradient, hessian, by_score, -by_score_twice


def _density(at: Floats) -> Floats:
    return np.asarray(np.exp(-0.5 * at * at) / np.sqrt(2 * np.pi))
