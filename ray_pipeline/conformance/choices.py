"""Checks of who rates what: users, movies, their laws, genres, partitions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Counted, Distance, Estimate, Measure, Unchecked, quadratic
from ray_pipeline.model.arrival import Arrivals
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
_CROWDING = {"session_length": 1.0, "new_user_share": 0.0}
_LEANING = {"taste_exposure": 0.0, "new_movie_share": 0.0}
"""Settings, with what turns them off, beside which the law of users, or of movies, is another than activity's or popularity's."""
_TOO_FEW = Unchecked("fewer than 100 ratings are of declared users and movies")


def user_ids(evidence: Evidence) -> Measure:
    """Ratings by users that are none: there must be none."""
    return Counted.exactly(int((evidence.user < 0).sum()), 0)


def movie_ids(evidence: Evidence) -> Measure:
    """Ratings of movies that are not in the catalogue: there must be none."""
    return Counted.exactly(int((evidence.movie < 0).sum()), 0)


def distinct_users(evidence: Evidence) -> Measure:
    """How many different users have rated, as many as the declared law lets rate in so many sessions."""
    world, other_law = evidence.declared, _other_law(evidence, _CROWDING)
    expected = variance = 0.0
    for p in range(world.settings.partitions):
        law = world.user_law[world.user_map.partition == p]
        position = evidence.position[(evidence.sample.partition == p) & ~evidence.struck]
        law = _mean_law(law / law.sum(), world.shard(p).users.arrivals, position)
        some, spread = _occupied(law, len(position) / world.settings.session_length, exactly=not other_law)
        expected, variance = expected + some, variance + spread
    if other_law:
        expected, variance = _distinct(evidence.again, evidence.again.sample.user_ids), 2 * variance + 1
    return Estimate(_distinct(evidence, evidence.sample.user_ids), np.sqrt(max(variance, 0.25)), expected)


def distinct_movies(evidence: Evidence) -> Measure:
    """How many different movies have been rated."""
    world, other_law = evidence.declared, _other_law(evidence, _LEANING)
    position = evidence.position[~evidence.struck]
    law = _mean_law(world.movie_law, world.movies.arrivals, position)
    expected, variance = _occupied(law, len(position), exactly=not other_law)
    if other_law:
        expected, variance = _distinct(evidence.again, evidence.again.sample.movie_ids), 2 * variance + 1
    return Estimate(_distinct(evidence, evidence.sample.movie_ids), np.sqrt(max(variance, 0.25)), expected)


def activity(evidence: Evidence) -> Measure:
    """``activity_sigma``: by which power of the activity that belongs to sigma 1 users of a shard rate."""
    found = _activity(evidence)
    return _beside(found, _activity(evidence.again), evidence) if _other_law(evidence, _CROWDING) else found


def popularity(evidence: Evidence) -> Measure:
    """``popularity_exponent``: by which power of their rank movies are rated."""
    found = _popularity(evidence)
    return _beside(found, _popularity(evidence.again), evidence) if _other_law(evidence, _LEANING) else found


def genres(evidence: Evidence) -> Measure:
    """Ratings by genre, against what catalogue and popularity give; a movie counts in each of its genres."""
    movie = evidence.movie[(evidence.movie >= 0) & ~evidence.struck]
    if len(movie) < _FEWEST:
        return _TOO_FEW
    matrix, law = evidence.declared.catalogue.genre_matrix.astype(np.float64), evidence.declared.movie_law
    if not matrix.any():
        return Unchecked("the catalogue names no genres")
    spread = 1.0
    if _other_law(evidence, _LEANING):
        other = evidence.again.movie[~evidence.struck]
        law, spread = np.bincount(other, minlength=len(law)) / len(other), 2 * _alike(evidence)
    observed = np.bincount(movie, minlength=len(law)) @ matrix / len(movie)
    expected = law @ matrix
    covariance = ((matrix.T * law) @ matrix - np.outer(expected, expected)) * spread / len(movie)
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


def _other_law(evidence: Evidence, turned: Mapping[str, float]) -> bool:
    """Whether the plain law does not hold."""
    return any(getattr(evidence.declared.settings, name) != plain for name, plain in turned.items())


def _alike(evidence: Evidence) -> float:
    """How many ratings tell as much as one: those of a session, of a mean length and nearly geometric, are one choice."""
    return 2.0 * evidence.declared.settings.session_length - 1.0


def _beside(found: Measure, again: Measure, evidence: Evidence) -> Measure:
    """An estimate by the plain law, less what another play of the declared stream makes of it."""
    if not isinstance(found, Estimate) or not isinstance(again, Estimate):
        return found
    error = found.error * float(np.sqrt(2 * _alike(evidence)))
    return Estimate(found.declared + found.value - again.value, error, found.declared)


def _distinct(evidence: Evidence, ids: Ids) -> int:
    """How many different ids there are, those of attacks aside."""
    return len(np.unique(ids[~evidence.struck]))


def _activity(evidence: Evidence) -> Measure:
    world, known = evidence.declared, evidence.known
    if len(known) < _FEWEST:
        return _TOO_FEW
    counts = np.bincount(known.user, minlength=len(world.user_law))
    return _power(np.log(world.unit.user_law), counts, world.user_map.partition, world.laws_power[0])


def _popularity(evidence: Evidence) -> Measure:
    world, known = evidence.declared, evidence.known
    if len(known) < _FEWEST:
        return _TOO_FEW
    counts = np.bincount(known.movie, minlength=len(world.movie_law))
    one_group = np.zeros(len(counts), np.int32)
    return _power(np.log(world.unit.movie_law), counts, one_group, world.laws_power[1])


def _mean_law(law: Floats, arrivals: Arrivals | None, position: Floats) -> Floats:
    """The law of who, or what, occurs, in the mean over some positions: founders stand in for those that have yet to join."""
    if arrivals is None or not len(position):
        return law
    there = 1.0 - np.searchsorted(np.sort(position), arrivals.joins) / len(position)
    founders = np.where(arrivals.joins == 0, law, 0.0)
    return np.asarray(np.minimum(law * there + (1.0 - law @ there) * founders / founders.sum(), 1.0))


def _occupied(law: Floats, draws: float, exactly: bool) -> tuple[float, float]:
    """Mean and variance of the number of different items in so many draws (Johnson and Kotz, "Urn Models", 1977).

    An exact number of draws of one law makes the variance less than where so many are expected, as sessions are.
    """
    if not draws:
        return 0.0, 0.0
    with np.errstate(divide="ignore"):
        missed = np.exp(draws * np.log1p(-law))
    met, variance = float((1.0 - missed).sum()), float((missed * (1.0 - missed)).sum())
    return met, variance - draws * float((law * missed).sum()) ** 2 if exactly else variance


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
