"""The fit as a whole: biases, factors, habits, calibration on ratings held out, laws of activity and popularity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ray_pipeline.errors import RatingsFileError
from ray_pipeline.fitted import RAW_MEAN_MOST, RAW_SD_MOST, FittedModel, FittedSide
from ray_pipeline.fitting.als import Factoriser, Residuals
from ray_pipeline.fitting.biases import Biases, fit_biases
from ray_pipeline.fitting.calibration import Calibration, calibrate
from ray_pipeline.fitting.habits import WholeStars, fit_whole_stars
from ray_pipeline.fitting.reading import Ratings
from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.model.streams import halfwords

__all__ = ["fit"]

Floats = npt.NDArray[np.float64]

_LEAST_HELD_OUT = 50
_CALIBRATE_ON = 1 << 17
_BLOCK = 1 << 18
_HEAD = 100  # movies whose popularity gives the exponent


def fit(
    ratings: Ratings,
    catalogue: Catalogue | None,
    rank: int,
    seed: int,
    held_out_share: float,
    factorise: Factoriser,
    tell: Callable[[str], None],
) -> FittedModel:
    """Estimate everything that a stream needs.

    Args:
        ratings: the data.
        catalogue: titles and genres; movies that it lacks are called by their id.
        rank: number of latent factors, ≥ 1.
        seed: chooses the ratings that are held out, and where the factors start.
        held_out_share: share of the ratings that biases and factors do not see, 0 … 1.
        factorise: finds the factors.
        tell: is called with a line at each step.

    Returns:
        The model; its report has ``ratings``, ``users``, ``movies``, ``held_out`` (how many), ``whole_ratings`` (share of the ratings
        that are whole), ``whole_star_error`` (standard error of the setting ``whole_star_share``), and in stars ``mean`` and ``sd`` of
        the ratings, ``noise_sd``, and ``rmse`` on the held-out ratings of ``global_mean``, ``bias_only`` and ``model``.

    Raises:
        RatingsFileError: there are too few ratings to hold some out.
    """
    held = halfwords(seed, "fit/held-out", 0, len(ratings)) < round(held_out_share * 2**16)
    train, test = ratings.where(~held), ratings.where(held)
    if len(test) < _LEAST_HELD_OUT or len(train) < _LEAST_HELD_OUT:
        raise RatingsFileError(
            f"{len(ratings):,} ratings are too few: {len(test):,} were held out, {_LEAST_HELD_OUT} are needed",
            "Give more ratings, or another --held-out",
        )
    stars = test.half_stars / 2.0
    biases = fit_biases(train)
    by_bias = biases.predict(test)
    rmse = {
        "global_mean": _rms(stars - biases.mean),
        "bias_only": _rms(stars - np.clip(by_bias, 0.5, 5.0)),
    }
    tell(f"biases: held-out RMSE {rmse['bias_only']:.4f}, of the global mean {rmse['global_mean']:.4f}")
    residuals = (train.half_stars / 2.0 - biases.predict(train)).astype(np.float32)
    sizes = len(ratings.user_ids), len(ratings.movie_ids)
    factors = factorise(Residuals(*sizes, train.user, train.movie, residuals), rank, seed, tell)
    few, habit = slice(0, _CALIBRATE_ON), fit_whole_stars(ratings)
    whole = habit.chance[test.user[few]] if habit.share else None
    parts = [by_bias[few] - biases.mean, _products(*factors, test)[few]]
    calibration = calibrate(stars[few], biases.mean, parts, whole)
    rmse["model"] = calibration.rmse
    tell(f"factors: held-out RMSE {calibration.rmse:.4f}")
    model = _assembled(ratings, biases, factors, habit, calibration)
    report = {
        "ratings": len(ratings),
        "users": sizes[0],
        "movies": sizes[1],
        "held_out": len(test),
        "mean": float(ratings.half_stars.mean()) / 2,
        "sd": float(ratings.half_stars.std()) / 2,
        "whole_ratings": float((ratings.half_stars % 2 == 0).mean()),
        "whole_star_error": habit.error,
        "noise_sd": calibration.noise_sd,
        "rmse": rmse,
    }
    titles, genres = _named(model.movies.ids, catalogue, tell)
    return replace(model, titles=titles, genres=genres, report=report)


# -- inside


@dataclass
class _Side:
    """One side while it is put together, in float64; ``weights`` sum to 1."""

    biases: Floats
    factors: Floats
    weights: Floats

    def mean(self) -> Floats:
        return np.asarray(self.weights @ self.factors)

    def second_moment(self) -> Floats:
        return np.asarray((self.factors.T * self.weights) @ self.factors)

    def bias_variance(self) -> float:
        return float(self.weights @ self.biases**2)


def _assembled(
    ratings: Ratings,
    biases: Biases,
    factors: tuple[npt.NDArray[np.float32], ...],
    habit: WholeStars,
    calibration: Calibration,
) -> FittedModel:
    """The calibrated model, without titles.

    Centred so that mean, biases and factors are uncorrelated in the stream, which draws users and movies by their numbers of
    ratings: so their variances add up, and each share is what it says.
    """
    counts = [
        np.bincount(position, minlength=len(ids)).astype(np.int64)
        for position, ids in ((ratings.user, ratings.user_ids), (ratings.movie, ratings.movie_ids))
    ]
    users, movies = (
        _Side(bias * calibration.stretch[0], factor.astype(np.float64), count / count.sum())
        for bias, factor, count in zip((biases.users, biases.movies), factors, counts, strict=True)
    )
    users.factors *= calibration.stretch[1]
    mean = biases.mean + calibration.shift + _centre(users, movies)
    scale = np.array([_deviation(moment) for moment in np.diag(movies.second_moment())])
    movies.factors /= scale
    users.factors *= scale
    variances = {
        "user_bias_share": users.bias_variance(),
        "movie_bias_share": movies.bias_variance(),
        "factor_share": float((users.second_moment() * movies.second_moment()).sum()),
    }
    variance = sum(variances.values()) + calibration.noise_sd**2
    users.biases = users.biases / _deviation(variances["user_bias_share"])
    movies.biases = movies.biases / _deviation(variances["movie_bias_share"])
    users.factors = users.factors / _deviation(variances["factor_share"] / factors[0].shape[1])
    settings = {
        "users": len(ratings.user_ids),
        "movies": len(ratings.movie_ids),
        "rank": factors[0].shape[1],
        # of raw scores: where most ratings are the highest, their mean lies above it, within the bounds by the calibration
        "mean_rating": float(np.clip(mean, -RAW_MEAN_MOST, RAW_MEAN_MOST)),
        "rating_sd": min(float(np.sqrt(variance)), RAW_SD_MOST),
        **{name: share / variance for name, share in variances.items()},
        "popularity_exponent": _zipf_exponent(counts[1]),
        "activity_sigma": float(np.clip(np.log(counts[0]).std(), 0.0, 3.0)),
        # what genres and scales there are is in factors and biases
        "genre_share": 0.0,
        "user_scale_sigma": 0.0,
        "whole_star_share": habit.share,
    }
    sides = [
        FittedSide(ids, side.factors.astype(np.float32), side.biases.astype(np.float32), count)
        for ids, side, count in zip((ratings.user_ids, ratings.movie_ids), (users, movies), counts, strict=True)
    ]
    return FittedModel(sides[0], sides[1], habit.chance, (), (), settings)


def _centre(users: _Side, movies: _Side) -> float:
    """Move what factors say of all movies or all users alike into the biases, and the biases' means out of them.

    ``U·V = (U - Ū)·(V - V̄) + U·V̄ + Ū·(V - V̄)``; returns the means, stars.
    """
    user_mean, movie_mean = users.mean(), movies.mean()
    users.biases = users.biases + users.factors @ movie_mean
    movies.biases = movies.biases + (movies.factors - movie_mean) @ user_mean
    users.factors = users.factors - user_mean
    movies.factors = movies.factors - movie_mean
    moved = 0.0
    for side in (users, movies):
        middle = float(side.weights @ side.biases)
        side.biases = side.biases - middle
        moved += middle
    return moved


def _deviation(variance: float) -> float:
    """What to divide by for a variance of 1; 1 where all is 0."""
    return float(np.sqrt(variance)) or 1.0


def _zipf_exponent(counts: npt.NDArray[np.int64]) -> float:
    """The slope of count against rank, both logarithmic, over the most popular movies."""
    head = np.sort(counts)[::-1][:_HEAD]
    if len(head) < 2:
        return 0.0
    slope = np.polyfit(np.log(np.arange(1, len(head) + 1)), np.log(head), 1)[0]
    return float(np.clip(-slope, 0.0, 3.0))


def _products(users: npt.NDArray[np.float32], movies: npt.NDArray[np.float32], ratings: Ratings) -> Floats:
    """U·V of each rating, shape (n,), stars."""
    found = np.empty(len(ratings))
    for lo in range(0, len(ratings), _BLOCK):
        part = slice(lo, lo + _BLOCK)
        found[part] = (users[ratings.user[part]] * movies[ratings.movie[part]]).sum(axis=1)
    return found


def _named(
    movie_ids: npt.NDArray[np.int64], catalogue: Catalogue | None, tell: Callable[[str], None]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Titles and genres of some movies."""
    if catalogue is None:
        return tuple(f"movie {i}" for i in movie_ids.tolist()), ((),) * len(movie_ids)
    at = catalogue.index_of(movie_ids).tolist()
    unknown = at.count(-1)
    if unknown:
        tell(f"movies: {unknown:,} of {len(at):,} are not in the catalogue: they are called by their ids")
    titles = (catalogue.titles[p] if p >= 0 else f"movie {i}" for p, i in zip(at, movie_ids.tolist(), strict=True))
    return tuple(titles), tuple(catalogue.genres[p] if p >= 0 else () for p in at)


def _rms(errors: Floats) -> float:
    return float(np.sqrt((errors**2).mean()))
