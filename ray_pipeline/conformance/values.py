"""Checks of what the ratings say: their scale, what they depend on, how they are spread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Counted, Distance, Estimate, Measure, Unchecked, quadratic
from ray_pipeline.conformance.scores import ScoreFit
from ray_pipeline.events import HALF_STARS_MAX, HALF_STARS_MIN
from ray_pipeline.truth.law import RatingLaw

__all__ = ["factor_share", "histogram", "mean", "movie_bias_share", "noise_share", "rank", "spread", "user_bias_share"]

_BLOCK = 1 << 14
_RANKED_MOST = 200_000
_CERTAIN = 5.0  # standard errors that a factor's weight must be above 0
_NOISELESS = 0.03  # stars; half stars do not tell less noise from none
_TOO_FEW = Unchecked(
    "too few ratings of declared users and movies, or too few that differ, to tell the terms of a score apart"
)


def mean(evidence: Evidence) -> Measure:
    """``mean_rating``, from ratings by maximum likelihood."""
    return _fitted(evidence, lambda fit: fit.mean(evidence.declared.settings.mean_rating))


def spread(evidence: Evidence) -> Measure:
    """``rating_sd``."""
    return _fitted(evidence, lambda fit: fit.deviation(evidence.declared.settings.rating_sd))


def user_bias_share(evidence: Evidence) -> Measure:
    """Share of the variance that the known user biases explain."""
    return _fitted(evidence, lambda fit: fit.share(1, evidence.declared.settings.user_bias_share))


def movie_bias_share(evidence: Evidence) -> Measure:
    """Share of the variance that the known movie biases explain."""
    return _fitted(evidence, lambda fit: fit.share(2, evidence.declared.settings.movie_bias_share))


def factor_share(evidence: Evidence) -> Measure:
    """Share of the variance that the known factors explain."""
    return _fitted(evidence, lambda fit: fit.share(3, evidence.declared.settings.factor_share))


def noise_share(evidence: Evidence) -> Measure:
    """Share of the variance that nothing explains."""
    world, fit = evidence.declared, evidence.fit
    declared_sd = world.settings.rating_sd * world.noise_share**0.5
    if fit is None or max(declared_sd, abs(fit.scales[4])) > _NOISELESS:
        return _fitted(evidence, lambda fit: fit.share(4, world.noise_share))
    share = fit.share(4, world.noise_share).value
    return Counted(share, world.noise_share, 0.0, max(share, world.noise_share))


def rank(evidence: Evidence) -> Measure:
    """How many of the declared factors the ratings depend on.

    One Newton step from the fit, in which all factors weigh alike, to one in which each has its own weight.
    """
    settings, fit = evidence.declared.settings, evidence.fit
    if fit is None:
        return _TOO_FEW
    if settings.factor_share == 0:
        return Unchecked("factor_share is 0: no rating depends on a factor")
    unit, scored = evidence.declared.unit, evidence.scored
    rows = slice(None, None, max(1, len(scored) // _RANKED_MOST))
    products = unit.users.factors[scored.user[rows]] * unit.movies.factors[scored.movie[rows]]
    if evidence.habits.scales is not None:
        products /= evidence.habits.scales[rows, None]
    slope, weight = fit.slope[rows], fit.weight[rows]
    information = (products.T * weight) @ products
    weights = fit.scales[3] + np.linalg.pinv(information) @ (products.T @ slope)
    errors = np.sqrt(np.diag(np.linalg.pinv(information)))
    declared = np.sqrt(settings.factor_share) * settings.rating_sd
    if declared < 2 * _CERTAIN * float(errors.max()):
        return Unchecked("too few ratings to tell the factors apart")
    return Counted.exactly(int((weights > _CERTAIN * errors).sum()), settings.rank)


def histogram(evidence: Evidence) -> Measure:
    """The ten ratings, against their exact law given each rating's user and movie."""
    if not len(evidence.scored):
        return _TOO_FEW
    expected, covariance = expected_histogram(evidence)
    observed = observed_histogram(evidence)
    chi_square, degrees = quadratic(observed - expected, covariance)
    return Distance(float(np.abs(observed - expected).sum()) / 2 / len(evidence.scored), chi_square, degrees)


def observed_histogram(evidence: Evidence) -> npt.NDArray[np.float64]:
    """How often each of the ten ratings stands among the scored ones, shape (10,)."""
    counts = np.bincount(evidence.scored.half_stars, minlength=HALF_STARS_MAX + 1)[HALF_STARS_MIN:]
    return counts.astype(np.float64)


def expected_histogram(evidence: Evidence) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """How often each must stand there, shape (10,), and the covariance, shape (10, 10)."""
    model, scored = evidence.declared.model, evidence.scored
    law = RatingLaw(model.noise_sd)
    expected, covariance = np.zeros(HALF_STARS_MAX), np.zeros((HALF_STARS_MAX, HALF_STARS_MAX))
    for lo in range(0, len(scored), _BLOCK):
        part = slice(lo, lo + _BLOCK)
        reach = law.at_least(evidence.true_scores[part], evidence.habits.of(part))
        chance = -np.diff(reach, axis=1, prepend=1.0, append=0.0)
        expected += chance.sum(axis=0)
        covariance -= chance.T @ chance
    return expected, covariance + np.diag(expected)


def _fitted(evidence: Evidence, of: Callable[[ScoreFit], Estimate]) -> Measure:
    return _TOO_FEW if evidence.fit is None else of(evidence.fit)
