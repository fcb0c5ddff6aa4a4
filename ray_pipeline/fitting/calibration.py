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

from ray_pipeline.model.population import Habits
from ray_pipeline.truth.law import RatingLaw

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
    inverse = np.linalg.pinv(offsets.T @ offsets / len(stars))
    shift, stretch = 0.0, np.ones(len(parts))
    columns = np.stack(parts, axis=1)
    variance = max(float(((stars - centre - columns.sum(axis=1)) ** 2).mean()), _LEAST_NOISE**2)
    for _ in range(_ROUNDS):
        mean, spread = _law(centre + shift + columns @ stretch, variance, whole)
        rest = stars - mean
        shift += float(rest.mean())
        stretch = np.clip(stretch + inverse @ (offsets.T @ rest / len(stars)), 0.0, _MOST_STRETCH)
        variance = max(variance + float((rest**2 - spread).mean()), _LEAST_NOISE**2)
    mean, _ = _law(centre + shift + columns @ stretch, variance, whole)
    rmse = float(np.sqrt(((stars - mean) ** 2).mean()))
    return Calibration(shift, tuple(stretch.tolist()), float(np.sqrt(variance)), rmse)


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
