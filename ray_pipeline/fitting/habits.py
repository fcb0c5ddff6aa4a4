"""Who gives whole stars only: told by a mixture, since a few ratings may all be whole by chance.

A user has the habit, with probability ``share``, and gives no half star, or has not, and then gives one with a probability of the
user's own, which is spread over users by a beta law. So the number of half stars among a user's ratings has a zero-inflated
beta-binomial law (Skellam, "A probability distribution derived from the binomial distribution …", JRSS B, 1948; Hall, "Zero-inflated
Poisson and binomial regression with random effects", Biometrics, 2000). Its three numbers are found by maximum likelihood, the
share's error by the outer product of the users' slopes; by Bayes's rule they give the chance that a user without any half star has
the habit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import betaln, expit, log_expit, logit

from ray_pipeline.fitting.reading import Ratings

__all__ = ["WholeStars", "fit_whole_stars"]

Floats = npt.NDArray[np.float64]

# a beta law of a precision beyond e⁶ is a point, and differences of its logarithms lose their digits
_BOUNDS = ((-25.0, 25.0), (-12.0, 12.0), (-6.0, 6.0))
_PRECISION = {"ftol": 1e-13, "gtol": 1e-7}
_STEP = 1e-5


@dataclass(frozen=True, slots=True)
class WholeStars:
    """The habit of giving whole stars only.

    Attributes:
        share: of the users who have it, 0 … 1.
        error: its standard error; at least the share of one user.
        chance: shape (users,), float32: how likely each has it; 0 for whoever gave a half star; their mean is ``share``.
    """

    share: float
    error: float
    chance: npt.NDArray[np.float32]


def fit_whole_stars(ratings: Ratings) -> WholeStars:
    """Share of the users with the habit, and each user's chance to have it."""
    users = len(ratings.user_ids)
    given = np.bincount(ratings.user, minlength=users)
    halves = np.bincount(ratings.user, ratings.half_stars % 2, users).astype(np.int64)
    if (halves > 0).all() or not halves.any():
        share = float(not halves.any())
        return WholeStars(share, 1.0 / users, np.full(users, share, np.float32))
    pairs, which, count = np.unique(np.stack([given, halves]), axis=1, return_inverse=True, return_counts=True)
    n, k = pairs.astype(np.float64)
    often = np.clip(halves.sum() / given[halves > 0].sum(), 0.01, 0.99)
    start = np.array([logit((halves == 0).mean() / 2), logit(often), 2.0])
    point = minimize(
        lambda point: -float(count @ _log_likelihood(point, n, k)) / users, start, bounds=_BOUNDS, options=_PRECISION
    ).x
    share = float(expit(point[0]))
    chance = np.where(k == 0, np.exp(np.minimum(log_expit(point[0]) - _log_likelihood(point, n, k), 0.0)), 0.0)
    slopes = np.stack(
        [(_log_likelihood(point + s, n, k) - _log_likelihood(point - s, n, k)) / (2 * _STEP) for s in np.eye(3) * _STEP]
    )
    variance = np.linalg.pinv((slopes * count) @ slopes.T, hermitian=True)[0, 0]
    error = max(share * (1.0 - share) * float(np.sqrt(variance)), 1.0 / users)
    return WholeStars(share, error, chance[which.ravel()].astype(np.float32))


def _log_likelihood(point: Floats, n: Floats, k: Floats) -> Floats:
    """Of users with n ratings, k of them half stars; but for a term that is the same whatever the point.

    Args:
        point: logit of the share, logit of the mean probability of a half star, logarithm of the beta law's precision.
        n: shape (m,).
        k: shape (m,).
    """
    mean, precision = expit(point[1]), np.exp(point[2])
    a, b = mean * precision, (1.0 - mean) * precision
    without = log_expit(-point[0]) + betaln(k + a, n - k + b) - betaln(a, b)
    return np.asarray(np.where(k == 0, np.logaddexp(log_expit(point[0]), without), without))
