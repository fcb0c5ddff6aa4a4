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

from ray_pipeline.truth.law import Moments, RatingLaw

__all__ = ["Calibration", "calibrate"]

Floats = npt.NDArray[np.float64]

_ROUNDS = 30
_LEAST_NOISE = 0.01
_MOST_STRETCH = 2.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """``score = centre + shift + Σ stretch · part + noise``.

    Attributes:
        shift: stars.
        stretch: of each part, 0 … 2; 0 where it tells nothing of ratings that it has not seen.
        noise_sd: stars.
        rmse: of E[rating] against the ratings it was calibrated on, stars; by the calibration also the least that anybody can reach
            in the stream.
    """

    shift: float
    stretch: tuple[float, ...]
    noise_sd: float
    rmse: float


def calibrate(stars: Floats, centre: float, parts: Sequence[Floats], step: float = 0.5) -> Calibration:
    """Calibrate on ratings that the prediction has not seen.

    Args:
        stars: shape (n,), the ratings.
        centre: of the prediction, stars.
        parts: what the prediction adds to it for each rating, each of shape (n,), stars.
        step: 0.5 or 1: what scores are rounded to, stars.
    """
    offsets = np.stack([part - part.mean() for part in parts], axis=1)
    inverse = np.linalg.pinv(offsets.T @ offsets / len(stars))
    shift, stretch = 0.0, np.ones(len(parts))
    columns = np.stack(parts, axis=1)
    variance = max(float(((stars - centre - columns.sum(axis=1)) ** 2).mean()) - step**2 / 12, _LEAST_NOISE**2)
    for _ in range(_ROUNDS):
        law = _law(centre + shift + columns @ stretch, variance, step)
        rest = stars - law.mean
        shift += float(rest.mean())
        stretch = np.clip(stretch + inverse @ (offsets.T @ rest / len(stars)), 0.0, _MOST_STRETCH)
        variance = max(variance + float((rest**2 - law.variance).mean()), _LEAST_NOISE**2)
    law = _law(centre + shift + columns @ stretch, variance, step)
    rmse = float(np.sqrt(((stars - law.mean) ** 2).mean()))
    return Calibration(shift, tuple(stretch.tolist()), float(np.sqrt(variance)), rmse)


def _law(scores: Floats, variance: float, step: float) -> Moments:
    return RatingLaw(np.float32(np.sqrt(variance)), step).moments(scores.astype(np.float32))
