"""Checks of what changes in the course of the stream: drift and attacks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Counted, Distance, Measure, Unchecked, quadratic
from ray_pipeline.events import HALF_STARS_MAX
from ray_pipeline.model.ratings import to_half_stars
from ray_pipeline.scenario import parse_attack
from ray_pipeline.truth.law import RatingLaw

__all__ = ["attacks", "drift"]

Floats = npt.NDArray[np.float64]

_STRETCHES = 16
_LOOKED_AT = 200_000
_FEWEST = 30
_TOO_FEW = Unchecked("fewer than 1,600 ratings of declared users and movies")


def drift(evidence: Evidence) -> Measure:
    """Ratings less what is expected of them, with declared drift, by stretch of the stream, over all and by genre: nothing is left."""
    stretches = _stretches(evidence)
    if not stretches:
        return _TOO_FEW
    genres = evidence.declared.catalogue.genre_matrix
    chi_square, degrees, off = 0.0, 0, 0.0
    for row in stretches:
        residual, variance, _ = _law(evidence, row)
        of_genre = genres[evidence.scored.movie[row]]
        about = np.column_stack([np.ones(len(row)), of_genre[:, of_genre.sum(axis=0) >= _FEWEST]])
        some, free = quadratic(about.T @ residual, (about.T * variance) @ about)
        chi_square, degrees = chi_square + some, degrees + free
        off += abs(float(residual.mean())) / len(stretches)
    return Distance(off, chi_square, degrees)


def attacks(evidence: Evidence) -> Measure:
    """The lowest and the highest ratings, by stretch of the stream, against their exact law; and what attacks must have given."""
    world, sample = evidence.declared, evidence.sample
    missed = 0
    for p in range(world.settings.partitions if world.settings.attack else 0):
        row = np.flatnonzero((sample.partition == p) & evidence.struck)
        model = world.shard(p)
        drawn = [model.attacks(int(i), 1) for i in sample.index[row].tolist()]
        for at, strike in zip(row.tolist(), drawn, strict=True):
            if strike is not None and strike.hit.any():
                attack = parse_attack(world.settings.attack[int(strike.attack[0])])
                given = to_half_stars(np.array([attack.rating], np.float32), model.users.habits.of(strike.user).whole)
                missed += sample.movie_ids[at] != attack.movie or sample.half_stars[at] != given[0]
    if missed:
        return Counted.exactly(float(missed), 0.0)
    stretches = _stretches(evidence)
    if not stretches:
        return _TOO_FEW
    chi_square, degrees, off = 0.0, 0, 0.0
    for row in stretches:
        _, _, ends = _law(evidence, row)
        found = evidence.scored.half_stars[row]
        lowest = 1 if evidence.habits.whole is None else 1 + evidence.habits.whole[row]
        difference = np.array([(found <= lowest).sum(), (found == HALF_STARS_MAX).sum()]) - ends.sum(axis=0)
        covariance = np.diag(ends.sum(axis=0)) - ends.T @ ends
        some, free = quadratic(difference, covariance)
        chi_square, degrees = chi_square + some, degrees + free
        off += float(np.abs(difference).sum()) / len(row) / len(stretches)
    return Distance(off, chi_square, degrees)


def _stretches(evidence: Evidence) -> list[npt.NDArray[np.int64]]:
    """Places of scored ratings, by stretch of the stream; none when there are too few."""
    rows = np.arange(0, len(evidence.scored), max(1, len(evidence.scored) // _LOOKED_AT))
    if len(rows) < 100 * _STRETCHES:
        return []
    order = np.argsort(evidence.position[evidence.scored.row[rows]], kind="stable")
    return [rows[part] for part in np.array_split(order, _STRETCHES)]


def _law(evidence: Evidence, row: npt.NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """Of some scored ratings: rating less its expectation, the variance of that, P(lowest) and P(highest), shape (n, 2)."""
    law = RatingLaw(evidence.declared.model.noise_sd)
    scores, habits = evidence.true_scores[row], evidence.habits.of(row)
    moments, reach = law.moments(scores, habits), law.at_least(scores, habits)
    above_lowest = reach[:, 0] if habits.whole is None else np.where(habits.whole, reach[:, 1], reach[:, 0])
    ends = np.column_stack([1.0 - above_lowest, reach[:, -1]])
    return evidence.scored.half_stars[row] / 2.0 - moments.mean, moments.variance, ends
