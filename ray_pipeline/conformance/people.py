"""Checks of how people behave: genres, scales, whole stars, tastes, sessions, newcomers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Counted, Estimate, Measure, Unchecked
from ray_pipeline.model.arrival import Arrivals, joining_words
from ray_pipeline.model.genres import with_genres
from ray_pipeline.model.population import Habits, movie_factors
from ray_pipeline.model.sessions import LANES
from ray_pipeline.model.streams import halfwords_of, normal_table
from ray_pipeline.truth.law import RatingLaw

__all__ = ["genre_weight", "joining_movies", "joining_users", "scale_spread", "session_length", "taste", "whole_stars"]

Floats = npt.NDArray[np.float64]

_LOOKED_AT = 200_000
_REPLICATES = 4
_LOOKS = 4
_FEWEST = 1_000
_FEWEST_HALVES = 20
_TOO_FEW = Unchecked("too few ratings of declared users and movies")


def genre_weight(evidence: Evidence) -> Measure:
    """√``genre_share``: what the genres' part of the factors counts in the ratings, beside the movies' own part.

    One Newton step from the fit, in which both count as declared, to one in which each has its own weight.
    """
    world, fit = evidence.declared, evidence.fit
    if fit is None:
        return _TOO_FEW
    if world.settings.factor_share == 0:
        return Unchecked("factor_share is 0: no rating depends on a factor")
    rows = slice(None, None, max(1, len(evidence.scored) // _LOOKED_AT))
    user, movie = evidence.scored.user[rows], evidence.scored.movie[rows]
    alone = movie_factors(world.settings, world.catalogue.movie_ids)[0]
    of_genres = with_genres(np.zeros_like(alone), world.catalogue, world.settings.seed, 1.0)
    known = np.array([bool(names) for names in world.catalogue.genres])[movie]
    if known.sum() < _FEWEST:
        return Unchecked("too few ratings of movies whose genres are known")
    ours = world.unit.users.factors[user]
    if evidence.habits.scales is not None:
        ours = ours / evidence.habits.scales[rows, None]
    parts = np.column_stack([np.einsum("ij,ij->i", ours, side[movie]) for side in (alone, of_genres)])[known]
    design = np.column_stack([evidence.terms.design[rows][known, :3], parts])
    inverse = np.linalg.pinv((design.T * fit.weight[rows][known]) @ design)
    share = world.settings.genre_share
    start = fit.scales[3] * np.sqrt([1.0 - share, share])
    own, genre = start + (inverse @ (design.T @ fit.slope[rows][known]))[3:]
    length = float(np.hypot(own, genre))
    gradient = np.array([-own * genre, own**2]) / max(length, 1e-9) ** 3
    error = float(np.sqrt(gradient @ inverse[3:, 3:] @ gradient))
    return Estimate(float(genre) / max(length, 1e-9), max(error, 1e-9), float(np.sqrt(share)))


def scale_spread(evidence: Evidence) -> Measure:
    """``user_scale_sigma``: how much wider than declared the ratings of users lie whose scale is to be wide.

    One step of a regression of squared residuals, over their variance, on the normal variate that each user's scale is made of.
    """
    world = evidence.declared
    rows = slice(None, None, max(1, len(evidence.scored) // _LOOKED_AT))
    if len(evidence.scored) < _FEWEST:
        return _TOO_FEW
    ids = world.users.user_ids
    variate = normal_table()[halfwords_of(world.settings.seed, "user/scale", ids, 1)[:, 0]].astype(np.float64)
    z = variate[evidence.scored.user[rows]]
    residual, variance = _residuals(evidence, rows)
    information = 2.0 * float((z**2 * variance).sum())
    if information < 1e-6:
        return Unchecked("there is no noise to see a scale in")
    beyond = z * (residual**2 - variance)
    error = float(np.sqrt((beyond**2).sum())) / information
    declared = world.settings.user_scale_sigma
    return Estimate(declared + float(beyond.sum()) / information, max(error, 1e-9), declared)


def whole_stars(evidence: Evidence) -> Measure:
    """``whole_star_share``: share of ratings that are whole, each user's habit known; who has it gives no half star at all."""
    if not len(evidence.scored):
        return _TOO_FEW
    half, whole = evidence.scored.half_stars % 2 == 1, evidence.habits.whole
    rows = slice(None, None, max(1, len(half) // _LOOKED_AT))
    law, scales = RatingLaw(evidence.declared.model.noise_sd), evidence.habits.of(rows).scales
    reach = law.at_least(evidence.true_scores[rows], Habits(scales))
    chance = -np.diff(reach, axis=1, prepend=1.0, append=0.0)[:, ::2].sum(axis=1)
    if chance.sum() < _FEWEST_HALVES:
        return Unchecked("hardly anybody would give a half star, whatever the habits")
    if whole is not None:
        chance *= ~whole[rows]
    found, declared = 1.0 - float(half[rows].mean()), 1.0 - float(chance.mean())
    if whole is not None and (half & whole).any():
        return Counted.exactly(found, declared)
    error = float(np.sqrt((chance * (1.0 - chance)).sum())) / len(chance)
    return Estimate(found, max(error, 1e-9), declared)


def taste(evidence: Evidence) -> Measure:
    """``taste_exposure``: mean of what taste and the movie's bias add to a score, in standard deviations, of what was watched.

    What is declared is played through anew, with other random numbers, for the same users.
    """
    world, settings = evidence.declared, evidence.declared.settings
    spread = settings.rating_sd * float(np.sqrt(settings.movie_bias_share + settings.factor_share))
    if not spread:
        return Unchecked("all movies are liked alike")
    if settings.new_movie_share:
        return Unchecked("new_movie_share: what there is to be watched changes all the time")
    watched = evidence.known.spread(_LOOKED_AT // _REPLICATES)
    if len(watched) < _FEWEST:
        return _TOO_FEW

    def tastes(user: npt.NDArray[np.int64], movie: npt.NDArray[np.int64]) -> Floats:
        taste = world.model.score(user, movie) - world.users.biases[user]
        scales = world.users.habits.of(user).scales
        return np.asarray(taste if scales is None else taste / scales) / spread

    random, below = np.random.default_rng(0), np.cumsum(world.movie_law)
    normal = normal_table().astype(np.float64)
    user = np.repeat(watched.user, _REPLICATES)
    found = np.empty(len(user))
    looking = np.arange(len(user))
    for look in range(_LOOKS):
        movie = np.minimum(np.searchsorted(below, random.random(len(looking)), "right"), len(below) - 1)
        found[looking] = tastes(user[looking], movie)
        liked = 1.0 - np.searchsorted(normal, -2.0 * found[looking]) / len(normal)
        if look < _LOOKS - 1:
            looking = looking[random.random(len(looking)) < settings.taste_exposure * (1.0 - liked)]
    actual = tastes(watched.user, watched.movie)
    if found.std() < 1e-3:
        return Unchecked("all that is watched is liked alike")
    error = float(np.sqrt(actual.var() / len(actual) + found.var() / len(found)))
    return Estimate(float(actual.mean()), max(error, 1e-9), float(found.mean()))


def session_length(evidence: Evidence) -> Measure:
    """``session_length``: how rarely the user of a lane changes, chance meetings of one user taken off."""
    world, sample = evidence.declared, evidence.sample
    if world.settings.new_user_share:
        return Unchecked("new_user_share: who may begin a session changes all the time")
    changes = chances = compared = 0.0
    for p in range(world.settings.partitions):
        row = np.flatnonzero(sample.partition == p)
        row = row[np.argsort(sample.index[row], kind="stable")]
        one, other = row[:-LANES], row[LANES:]
        paired = (sample.index[other] - sample.index[one] == LANES) & ~evidence.struck[one] & ~evidence.struck[other]
        law = world.user_law[world.user_map.partition == p]
        count = int(paired.sum())
        if not count or not law.sum():
            continue
        met = float(((law / law.sum()) ** 2).sum())
        changes += int((sample.user_ids[one[paired]] != sample.user_ids[other[paired]]).sum())
        chances, compared = chances + count * (1.0 - met), compared + count
    declared = world.settings.session_length
    if compared < _FEWEST or chances < _FEWEST:
        return Unchecked("too few ratings in a row, by too few users")
    share = min(chances / compared / declared, 1.0)
    error = np.sqrt(max(share * (1.0 - share), 1.0 / compared) / compared) * compared / chances * declared**2
    return Estimate(chances / max(changes, 1.0), float(error), declared)


def joining_users(evidence: Evidence) -> Measure:
    """``new_user_share``: mean, over the ratings, of the number that decides whether a user joins later."""
    world, sample, known = evidence.declared, evidence.sample, evidence.known
    if len(known) < _FEWEST:
        return _TOO_FEW
    total = expected = variance = 0.0
    for p in range(world.settings.partitions):
        users = world.shard(p).users
        row = known.row[sample.partition[known.row] == p]
        place = np.minimum(np.searchsorted(users.user_ids, sample.user_ids[row]), len(users.user_ids) - 1)
        law = world.user_law[np.searchsorted(world.users.user_ids, users.user_ids)]
        number, _ = joining_words(world.settings.seed, "user/arrival", users.user_ids)
        some, spread = _expected(number, law / law.sum(), users.arrivals, evidence.position[row])
        total, expected, variance = total + float(number[place].sum()), expected + some, variance + spread
    # ratings of a session are by one user: so many fewer tell
    error = np.sqrt(max(variance * (2.0 * world.settings.session_length - 1.0), 1e-9)) / len(known)
    return Estimate(total / len(known), float(error), expected / len(known))


def joining_movies(evidence: Evidence) -> Measure:
    """``new_movie_share``: mean, over the ratings, of the number that decides whether a movie appears later."""
    world, known = evidence.declared, evidence.known
    if world.settings.taste_exposure:
        return Unchecked("taste_exposure: popularity alone does not decide what is watched")
    if len(known) < _FEWEST:
        return _TOO_FEW
    number, _ = joining_words(world.settings.seed, "movie/arrival", world.movies.movie_ids)
    arrivals, position = world.movies.arrivals, evidence.position[known.row]
    expected, variance = _expected(number, world.movie_law, arrivals, position)
    error = np.sqrt(max(variance, 1e-9)) / len(known)
    return Estimate(float(number[known.movie].mean()), float(error), expected / len(known))


def _expected(number: Floats, law: Floats, arrivals: Arrivals | None, position: Floats) -> tuple[float, float]:
    """Sum of the expectations of a number of who occurs at some positions, and of its variances."""
    joins = np.zeros(len(law)) if arrivals is None else arrivals.joins
    order = np.argsort(joins, kind="stable")
    moments = np.stack([law, law * number, law * number**2])
    there = np.concatenate([np.zeros((3, 1)), np.cumsum(moments[:, order], axis=1)], axis=1)
    founders = moments[:, joins == 0].sum(axis=1)
    mass, mean, square = there[:, np.searchsorted(joins[order], position, "right")]
    mean = mean + (1.0 - mass) * founders[1] / founders[0]
    square = square + (1.0 - mass) * founders[2] / founders[0]
    return float(mean.sum()), float((square - mean**2).sum())


def _residuals(evidence: Evidence, rows: slice) -> tuple[Floats, Floats]:
    """Rating less its expectation, stars, and the variance of that, of some of the scored ratings."""
    law = RatingLaw(evidence.declared.model.noise_sd).moments(evidence.true_scores[rows], evidence.habits.of(rows))
    return evidence.scored.half_stars[rows] / 2.0 - law.mean, law.variance
