"""Checks of who rates what: users, movies, their laws, genres, partitions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Counted, Distance, Estimate, Measure, Unchecked, quadratic
from ray_pipeline.model.partitioner import partition_of

__all__ = [
    "activity",
    "distinct_movies",
    "distinct_users",
    "genres",
    "movie_ids",
    "partition_shares",
    "placement",
    "popularity",
    "user_ids",
]

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_STEPS_MOST = 100
_FEWEST = 100
_CROWDING = {
    "session_length": "session_length: a user's ratings come in runs",
    "new_user_share": "new_user_share: who there is changes all the time",
}
_LEANING = {
    "taste_exposure": "taste_exposure: popularity alone does not decide what is watched",
    "new_movie_share": "new_movie_share: what there is changes all the time",
}
"""Settings under which the plain law of users, or of movies, does not hold: their own checks judge those ratings."""
_TOO_FEW = Unchecked("fewer than 100 ratings are of declared users and movies")


def user_ids(evidence: Evidence) -> Measure:
    """Ratings by users that are none: there must be none."""
    return Counted.exactly(int((evidence.user < 0).sum()), 0)


def movie_ids(evidence: Evidence) -> Measure:
    """Ratings of movies that are not in the catalogue: there must be none."""
    return Counted.exactly(int((evidence.movie < 0).sum()), 0)


def distinct_users(evidence: Evidence) -> Measure:
    """How many different users have rated, as many as the declared law lets rate in so many ratings."""
    other = _other_law(evidence, _CROWDING)
    if other:
        return other
    law, partition = evidence.declared.user_law, evidence.declared.user_map.partition
    sizes = _sizes(evidence)
    expected = variance = 0.0
    for p, size in enumerate(sizes.tolist()):
        of_shard = law[partition == p]
        some, spread = _occupied(of_shard / of_shard.sum(), size)
        expected, variance = expected + some, variance + spread
    return Estimate(len(np.unique(evidence.sample.user_ids[~evidence.struck])), np.sqrt(max(variance, 0.25)), expected)


def distinct_movies(evidence: Evidence) -> Measure:
    """How many different movies have been rated."""
    other = _other_law(evidence, _LEANING)
    if other:
        return other
    expected, variance = _occupied(evidence.declared.movie_law, int((~evidence.struck).sum()))
    return Estimate(len(np.unique(evidence.sample.movie_ids[~evidence.struck])), np.sqrt(max(variance, 0.25)), expected)


def activity(evidence: Evidence) -> Measure:
    """``activity_sigma``: by which power of the activity that belongs to sigma 1 users of a shard rate."""
    other = _other_law(evidence, _CROWDING)
    if other:
        return other
    world, known = evidence.declared, evidence.known
    if len(known) < _FEWEST:
        return _TOO_FEW
    counts = np.bincount(known.user, minlength=len(world.user_law))
    return _power(np.log(world.unit.user_law), counts, world.user_map.partition, world.laws_power[0])


def popularity(evidence: Evidence) -> Measure:
    """``popularity_exponent``: by which power of their rank movies are rated."""
    other = _other_law(evidence, _LEANING)
    if other:
        return other
    world, known = evidence.declared, evidence.known
    if len(known) < _FEWEST:
        return _TOO_FEW
    counts = np.bincount(known.movie, minlength=len(world.movie_law))
    one_group = np.zeros(len(counts), np.int32)
    return _power(np.log(world.unit.movie_law), counts, one_group, world.laws_power[1])


def genres(evidence: Evidence) -> Measure:
    """Ratings by genre, against what catalogue and popularity give; a movie counts in each of its genres."""
    other = _other_law(evidence, _LEANING)
    if other:
        return other
    movie = evidence.movie[(evidence.movie >= 0) & ~evidence.struck]
    if len(movie) < _FEWEST:
        return _TOO_FEW
    matrix, law = evidence.declared.catalogue.genre_matrix.astype(np.float64), evidence.declared.movie_law
    if not matrix.any():
        return Unchecked("the catalogue names no genres")
    observed = np.bincount(movie, minlength=len(law)) @ matrix / len(movie)
    expected = law @ matrix
    covariance = ((matrix.T * law) @ matrix - np.outer(expected, expected)) / len(movie)
    chi_square, degrees = quadratic(observed - expected, covariance)
    return Distance(float(np.abs(observed - expected).sum() / 2 / expected.sum()), chi_square, degrees)


def placement(evidence: Evidence) -> Measure:
    """Ratings in another partition than murmur2 of their key gives: there must be none."""
    right = partition_of(evidence.sample.user_ids, evidence.declared.settings.partitions)
    return Counted.exactly(int((right != evidence.sample.partition).sum()), 0)


def partition_shares(evidence: Evidence) -> Measure:
    """Ratings by partition, against the summed activity of each one's users."""
    sample, declared = evidence.sample, evidence.declared
    there = sample.partition[sample.timestamps_ms <= evidence.through_ms]
    if len(there) < _FEWEST:
        return _TOO_FEW
    partitions = max(declared.settings.partitions, int(sample.partition.max()) + 1)
    sizes, law = np.bincount(there, minlength=partitions), np.zeros(partitions)
    law[: declared.settings.partitions] = [declared.user_map.share(p) for p in range(declared.settings.partitions)]
    chi_square, degrees = quadratic(sizes - len(there) * law, len(there) * (np.diag(law) - np.outer(law, law)))
    return Distance(float(np.abs(sizes / len(there) - law).sum()) / 2, chi_square, degrees)


def _other_law(evidence: Evidence, reasons: Mapping[str, str]) -> Unchecked | None:
    """Why the plain law does not hold; None when it does."""
    settings = evidence.declared.settings
    plain = {"session_length": 1.0}
    turned = [why for name, why in reasons.items() if getattr(settings, name) != plain.get(name, 0.0)]
    return Unchecked(turned[0]) if turned else None


def _sizes(evidence: Evidence) -> Ids:
    """Ratings of each declared partition, shape (partitions,)."""
    partitions = evidence.declared.settings.partitions
    return np.bincount(evidence.sample.partition[~evidence.struck], minlength=partitions)[:partitions]


def _occupied(law: Floats, draws: int) -> tuple[float, float]:
    """Mean and variance of the number of different items in so many draws (Johnson and Kotz, "Urn Models", 1977)."""
    with np.errstate(divide="ignore"):
        missed = np.exp(draws * np.log1p(-law))
    met = float((1.0 - missed).sum())
    return met, float((missed * (1.0 - missed)).sum()) - draws * float((law * missed).sum()) ** 2


def _power(log_unit: Floats, counts: Ids, group: npt.NDArray[np.int32], declared: float) -> Measure:
    """Maximum-likelihood θ of P(item | group) ∝ unit^θ: an exponential family, whose statistic is the mean of log unit."""
    items = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[items], prepend=-1))
    log_unit, counts = log_unit[items], counts[items]
    sizes = np.add.reduceat(counts, starts)
    which = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(items))))
    observed = float(counts @ log_unit)
    power, information = declared, 0.0
    for _ in range(_STEPS_MOST):
        exponent = power * log_unit
        weight = np.exp(exponent - np.maximum.reduceat(exponent, starts)[which])
        mass = np.add.reduceat(weight, starts)
        mean = np.add.reduceat(weight * log_unit, starts) / mass
        variance = np.add.reduceat(weight * (log_unit - mean[which]) ** 2, starts) / mass
        information = float(sizes @ variance)
        if information <= 0:
            return Unchecked("there is nothing to choose between")
        step = float(np.clip((observed - float(sizes @ mean)) / information, -1.0, 1.0))
        power += step
        if abs(step) < 1e-7:
            break
    return Estimate(power, information**-0.5, declared)
