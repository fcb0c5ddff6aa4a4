"""Drift: scores that shift somewhere in the stream, for some of the ratings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.model.cohort import cohort
from ray_pipeline.scenario import Drift, parse_drift

__all__ = ["DriftedScores", "amplitude"]

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Shift:
    drift: Drift
    users: Mask | None
    movies: Mask | None


class DriftedScores:
    """The shifts of one shard's scores.

    Args:
        settings: the event settings are used.
        user_ids: shape (n,), int64, the shard's users.
        movies: result of :func:`ray_pipeline.model.scopes.drifting_movies`.
    """

    def __init__(self, settings: Settings, user_ids: npt.NDArray[np.int64], movies: tuple[Mask | None, ...]) -> None:
        self._shifts = []
        for number, (text, chosen) in enumerate(zip(settings.drift, movies, strict=True)):
            drift = parse_drift(text)
            users = None
            if drift.scope.kind == "cohort":
                users = cohort(settings.seed, f"drift/{number}/cohort", user_ids, drift.scope.cohort)
            self._shifts.append(_Shift(drift, users, chosen))

    def add(
        self,
        scores: npt.NDArray[np.float32],
        user: npt.NDArray[np.int64],
        movie: npt.NDArray[np.int64],
        at: npt.NDArray[np.float64],
    ) -> None:
        """Shift some scores, in place.

        Args:
            scores: shape (n,), float32, stars.
            user: shape (n,), places of the users.
            movie: shape (n,), places of the movies.
            at: shape (n,), float64, positions, in any order.
        """
        reached = float(at.max()) if len(at) else -1.0
        for shift in self._shifts:
            if reached < shift.drift.start:
                continue
            part = (amplitude(shift.drift, at) * shift.drift.size).astype(np.float32)
            if shift.users is not None:
                part *= shift.users.take(user)
            if shift.movies is not None:
                part *= shift.movies.take(movie)
            scores += part


def amplitude(drift: Drift, at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How much of a drift is there at some positions, 0 … 1."""
    since = at - drift.start
    end = math.inf if drift.end is None else drift.end
    if drift.kind == "gradual":
        return np.clip(since / (end - drift.start), 0.0, 1.0)
    there = (since >= 0) & (at < end)
    if drift.kind == "recurring":
        there &= np.fmod(np.maximum(since, 0.0), drift.period) < drift.on * drift.period
    return there.astype(np.float64)
