"""A fitted model in a file: users, movies and the settings that were measured on somebody's ratings.

The file is NumPy's ``.npz`` without pickled objects: four arrays a side, one of the users' habit, and what is text as JSON in UTF-8.
What it is called by, and what the identity of a stream depends on, is the digest of its bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.errors import ConfigurationError, EnvironmentProblem

__all__ = [
    "FITTED_PREFIX",
    "RAW_MEAN_MOST",
    "RAW_SD_MOST",
    "REPLACED_FIELDS",
    "FittedModel",
    "FittedSide",
    "declared_settings",
    "load_fitted",
    "write_fitted",
]

FITTED_PREFIX = "fitted-"
"""What the digest of a model file begins with, and no other catalogue's does."""

REPLACED_FIELDS = (
    "users",
    "movies",
    "rank",
    "mean_rating",
    "rating_sd",
    "user_bias_share",
    "movie_bias_share",
    "factor_share",
    "popularity_exponent",
    "activity_sigma",
    "genre_share",
    "user_scale_sigma",
    "whole_star_share",
)
"""The settings that a model file brings: measured on the data, so that they say of the stream what they say of a synthetic one."""

RAW_MEAN_MOST = 20.0
"""So far from 0 the mean of raw scores may lie, stars. Where most ratings are the highest, the raw mean lies above it: stars."""

RAW_SD_MOST = 20.0
"""The most that raw scores may spread, stars."""

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class FittedSide:
    """The users, or the movies.

    Attributes:
        ids: shape (n,), int64, ascending, distinct, ≥ 1.
        factors: shape (n, rank), float32, as standard normal ones would be: over the ratings of the stream a movie's have variance 1,
            and a user's times a movie's, summed, variance ``rank``.
        biases: shape (n,), float32, of mean 0 and variance 1 over the ratings of the stream.
        counts: shape (n,), int64, ≥ 0: how many ratings each has in the data, and so how often it is drawn.
    """

    ids: npt.NDArray[np.int64]
    factors: npt.NDArray[np.float32]
    biases: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]

    def at(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Positions of some of the ids; all must be there."""
        return np.searchsorted(self.ids, ids)


@dataclass(frozen=True)
class FittedModel:
    """What a stream needs of somebody's ratings.

    Attributes:
        users: who rates.
        movies: what is rated.
        whole_stars: shape (users,), float32, 0 … 1: how likely each user gives whole stars only; the seed decides, once for
            all of a user's ratings.
        titles: a title a movie.
        genres: the genres of each movie, sorted; empty where none is known.
        settings: a value for each of :data:`REPLACED_FIELDS`.
        report: how the fit went, for people: see :func:`ray_pipeline.fitting.fit.fit`.
        digest: names the file's content; empty while it is not written.
    """

    users: FittedSide
    movies: FittedSide
    whole_stars: npt.NDArray[np.float32]
    titles: tuple[str, ...]
    genres: tuple[tuple[str, ...], ...]
    settings: Mapping[str, Any]
    report: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""


def write_fitted(path: Path, model: FittedModel) -> str:
    """Write a model, under another name first, so that the file is whole whenever it is there.

    Returns:
        Its digest.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    texts = {
        "about": {"format": _FORMAT, "settings": dict(model.settings), "report": dict(model.report)},
        "titles": model.titles,
        "genres": model.genres,
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.frombuffer(json.dumps(text).encode(), np.uint8) for name, text in texts.items()
    }
    for side in ("users", "movies"):
        for name in ("ids", "factors", "biases", "counts"):
            arrays[f"{side}_{name}"] = getattr(getattr(model, side), name)
    arrays["whole_stars"] = model.whole_stars
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        digest = _digest(unfinished.read_bytes())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise EnvironmentProblem(f"{path} cannot be written ({error.strerror})", "Name another with --output") from None
    return digest


def load_fitted(path: Path) -> FittedModel:
    """Read a model; what was read is kept until the file changes.

    Raises:
        ConfigurationError: the file is missing, damaged, or no model.
    """
    return _load(path, *_version(path))


def declared_settings(path: Path) -> dict[str, Any]:
    """The settings that a model file brings: those of :data:`REPLACED_FIELDS`.

    Raises:
        ConfigurationError: the file is missing, damaged, or no model.
    """
    return dict(load_fitted(path).settings)


def _version(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigurationError(
            f"model file {path} cannot be read ({error.strerror})", "Make it with ray-pipeline fit, or correct --model"
        ) from None
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=2)
def _load(path: Path, _changed_ns: int, _size: int) -> FittedModel:
    damaged = "Copy it again, or make it again with ray-pipeline fit"
    try:
        content = path.read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        texts = {name: json.loads(arrays[name].tobytes()) for name in ("about", "titles", "genres")}
        model = _model(arrays, texts, _digest(content))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigurationError(f"model file {path} is damaged or no model: {error}", damaged) from None
    wrong = _wrong(model)
    if wrong:
        raise ConfigurationError(f"model file {path} is damaged: {wrong}", damaged)
    return model


def _model(arrays: Mapping[str, npt.NDArray[Any]], texts: Mapping[str, Any], digest: str) -> FittedModel:
    about = texts["about"]
    if about["format"] != _FORMAT:
        msg = f"its format is {about['format']}, this version reads {_FORMAT}"
        raise ValueError(msg)
    users, movies = (
        FittedSide(*(arrays[f"{side}_{name}"] for name in ("ids", "factors", "biases", "counts")))
        for side in ("users", "movies")
    )
    settings = {name: about["settings"][name] for name in REPLACED_FIELDS}
    genres = tuple(tuple(map(str, names)) for names in texts["genres"])
    titles = tuple(map(str, texts["titles"]))
    return FittedModel(users, movies, arrays["whole_stars"], titles, genres, settings, about["report"], digest)


def _wrong(model: FittedModel) -> str:
    """What does not fit together; empty when all does."""
    rank = model.settings["rank"]
    for name, side in (("users", model.users), ("movies", model.movies)):
        n = len(side.ids)
        if n == 0 or n != model.settings[name]:
            return f"it has {n} {name} where it says {model.settings[name]}"
        if side.factors.shape != (n, rank) or side.biases.shape != (n,) or side.counts.shape != (n,):
            return f"its arrays of {name} have different lengths, or not {rank} factors"
        if [a.dtype for a in (side.ids, side.factors, side.biases, side.counts)] != ["<i8", "<f4", "<f4", "<i8"]:
            return f"its arrays of {name} are of other types than int64 and float32"
        if int(side.ids[0]) < 1 or int(side.ids[-1]) >= 2**31 or not (np.diff(side.ids) > 0).all():
            return f"its ids of {name} are not ascending from 1 to 2147483647"
        if not np.isfinite(side.factors).all() or not np.isfinite(side.biases).all():
            return f"factors or biases of {name} are not finite"
        if int(side.counts.min()) < 0 or not side.counts.any():
            return f"the counts of {name} are below 0, or all 0"
    whole = model.whole_stars
    if whole.shape != model.users.ids.shape or whole.dtype != "<f4" or not ((whole >= 0) & (whole <= 1)).all():
        return "whole_stars is not a number from 0 to 1, float32, for each user"
    if len(model.titles) != len(model.movies.ids) or len(model.genres) != len(model.movies.ids):
        return "titles or genres are not as many as movies"
    return ""


def _digest(content: bytes) -> str:
    return FITTED_PREFIX + hashlib.sha256(content).hexdigest()[:16]
