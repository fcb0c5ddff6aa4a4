"""From predictions to scores: what the stream's noise, rounding and clipping must be given so that they make the held-out ratings.

Ratings are rounded and clipped scores, so a mean of ratings is no mean of scores, and the spread of ratings around their prediction
is no noise. Shift, stretches and noise are those for which the exact law of a rating (:mod:`ray_pipeline.truth.law`) has the
held-out ratings' mean, their regression on each part of the prediction, and their spread around it: as many moments as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from ray_pipeline.events import HALF_STARS_MAX, HALF_STARS_MIN
from ray_pipeline.fitted import RAW_MEAN_MOST
from ray_pipeline.model.population import Habits
from ray_pipeline.truth.law import RatingLaw

__all__ = ["Calibration", "calibrate"]

Floats = npt.NDArray[np.float64]

_ROUNDS = 100
_CLOSE = 1e-4
_LEAST_NOISE, _MOST_NOISE = 0.01, 15.0  # of ratings at both ends alone, noise would be without end
_MOST_MEAN = RAW_MEAN_MOST - 1.0  # to either side
_MOST_STRETCH = 10.0
_LEAST_FREE = 1e-4
_LOW, _HIGH = HALF_STARS_MIN / 2, HALF_STARS_MAX / 2


@dataclass(frozen=True, slots=True)
class Calibration:
    """``score = centre + shift + Σ stretch · part + noise``.

    Attributes:
        shift: stars; where many ratings are the highest or the lowest, it may take the scores' mean beyond them, 20 stars at most.
        stretch: of each part, 0 … 10; 0 where it tells nothing of ratings that it has not seen.
        noise_sd: stars, 0.01 … 15.
        rmse: of E[rating] against the ratings it was calibrated on, stars; by the calibration also the least that anybody can reach
            in the stream.
    """

    shift: float
    stretch: tuple[float, ...]
    noise_sd: float
    rmse: float


def calibrate(
    stars: Floats, centre: float, parts: Sequence[Floats], whole: npt.NDArray[np.float32] | None = None
) -> Calibration:
    """Calibrate on ratings that the prediction has not seen.

    Args:
        stars: shape (n,), the ratings.
        centre: of the prediction, stars.
        parts: what the prediction adds to it for each rating, each of shape (n,), stars.
        whole: shape (n,), 0 … 1, how likely each rating's user gives whole stars only; None = nobody does.
    """
    offsets = np.stack([part - part.mean() for part in parts], axis=1)
    shift, stretch = 0.0, np.ones(len(parts))
    columns = np.stack(parts, axis=1)
    variance = max(float(((stars - centre - columns.sum(axis=1)) ** 2).mean()), _LEAST_NOISE**2)
    for _ in range(_ROUNDS):
        before = np.array([shift, np.log(variance), *stretch])
        scores, noise_sd = centre + shift + columns @ stretch, float(np.sqrt(variance))
        mean, spread = _law(scores, variance, whole)
        rest, free, pulled = stars - mean, *_cut_off(scores, noise_sd)
        ratio = float((rest**2).mean() / max(spread.mean(), _LEAST_NOISE**2))
        # the wider the noise, the further out the mean
        most = min(_MOST_NOISE, noise_sd * _MOST_MEAN / max(abs(centre + shift), 1.0))
        wider = float(np.clip(variance * np.clip(ratio, 0.5, 2.0), _LEAST_NOISE**2, most**2))
        # what wider noise does to the mean, the shift takes back: without that the two chase each other where much is cut off
        for wanted in (rest.mean(), -(wider - variance) * pulled.mean()):
            shift += float(np.clip(wanted / free.mean(), -noise_sd, noise_sd))
        inverse = np.linalg.pinv((offsets.T * free) @ offsets / len(stars), hermitian=True)
        stretch = np.clip(stretch + inverse @ (offsets.T @ rest / len(stars)), 0.0, _MOST_STRETCH)
        variance = wider
        if np.abs(before - [shift, np.log(variance), *stretch]).max() < _CLOSE:
            break
    mean, _ = _law(centre + shift + columns @ stretch, variance, whole)
    rmse = float(np.sqrt(((stars - mean) ** 2).mean()))
    return Calibration(shift, tuple(stretch.tolist()), float(np.sqrt(variance)), rmse)


def _cut_off(scores: Floats, noise_sd: float) -> tuple[Floats, Floats]:
    """What E[rating] makes of a little more score, stars a star, and of a little more noise, stars a star², each of shape (n,).

    But for rounding: the chance that a rating is not cut off at an end, and half of the difference of the noise's densities there.
    """
    low, high = (_LOW - scores) / noise_sd, (_HIGH - scores) / noise_sd
    density_low, density_high = (np.exp(-(at**2) / 2) / (np.sqrt(2 * np.pi) * noise_sd) for at in (low, high))
    return np.maximum(ndtr(high) - ndtr(low), _LEAST_FREE), (density_low - density_high) / 2


def _law(scores: Floats, variance: float, whole: npt.NDArray[np.float32] | None) -> tuple[Floats, Floats]:
    """Mean and variance of each rating; of half and whole stars together where nobody knows."""
    law, rounded = RatingLaw(np.float32(np.sqrt(variance))), scores.astype(np.float32)
    half = law.moments(rounded)
    if whole is None:
        return half.mean, half.variance
    full = law.moments(rounded, Habits(whole=np.ones(len(scores), np.bool_)))
    mean = half.mean + whole * (full.mean - half.mean)
    square = (1.0 - whole) * (half.variance + half.mean**2) + whole * (full.variance + full.mean**2)
    return mean, np.maximum(square - mean**2, 0.0)
