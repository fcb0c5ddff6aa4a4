"""Ratings from a file in MovieLens's layout, CSV or Parquet, read in bounded pieces."""

from __future__ import annotations

import csv
import io
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from ray_pipeline.errors import RatingsFileError
from ray_pipeline.events import HALF_STARS_MAX, HALF_STARS_MIN, ID_MOST, id_in

__all__ = ["ColumnNames", "Ratings", "read_ratings"]

_BLOCK_BYTES = 8 << 20
_BATCH_ROWS = 1 << 18
_TELL_EVERY = 5_000_000
_STARS = {half / 2 for half in range(HALF_STARS_MIN, HALF_STARS_MAX + 1)}


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """What the columns are called in the file; others are passed over."""

    user: str = "userId"
    movie: str = "movieId"
    rating: str = "rating"

    def all(self) -> list[str]:
        """The three names."""
        return [self.user, self.movie, self.rating]


@dataclass(frozen=True, slots=True)
class Ratings:
    """Ratings in columns, users and movies as positions in their ids.

    Attributes:
        user_ids: shape (users,), int64, ascending, distinct.
        movie_ids: shape (movies,), int64, ascending, distinct.
        user: shape (n,), int32, positions in ``user_ids``.
        movie: shape (n,), int32, positions in ``movie_ids``.
        half_stars: shape (n,), uint8, 1 … 10.
    """

    user_ids: npt.NDArray[np.int64]
    movie_ids: npt.NDArray[np.int64]
    user: npt.NDArray[np.int32]
    movie: npt.NDArray[np.int32]
    half_stars: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.half_stars)

    def where(self, chosen: npt.NDArray[np.bool_]) -> Ratings:
        """Some of the ratings; users and movies stay."""
        return Ratings(self.user_ids, self.movie_ids, self.user[chosen], self.movie[chosen], self.half_stars[chosen])


def read_ratings(path: Path, names: ColumnNames, tell: Callable[[str], None]) -> Ratings:
    """Read all ratings. Takes 9 bytes a rating, and 16 more while ids become positions.

    Args:
        path: CSV with a header, also compressed (.gz, .bz2, .zst), or Parquet.
        names: of the columns.
        tell: is called with a line from time to time.

    Raises:
        RatingsFileError: the file is missing or cannot be read, a column is, or a row is malformed; names the line and the reason.
    """
    with RatingsFileError.reading(path, "ratings file", "CSV or Parquet file"):
        path.open("rb").close()
    pieces: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint8]]] = []
    rows = told = 0
    for piece in _parquet(path, names) if _is_parquet(path) else _csv(path, names):
        pieces.append(piece)
        rows += len(piece[0])
        if rows - told >= _TELL_EVERY:
            told = rows
            tell(f"read {rows:,} ratings so far")
    if not rows:
        raise RatingsFileError(f"ratings file {path}: there is no rating in it", "Name another file")
    user_ids, user = np.unique(np.concatenate([p[0] for p in pieces]), return_inverse=True)
    movie_ids, movie = np.unique(np.concatenate([p[1] for p in pieces]), return_inverse=True)
    half_stars = np.concatenate([p[2] for p in pieces])
    return Ratings(
        user_ids.astype(np.int64), movie_ids.astype(np.int64), user.astype(np.int32), movie.astype(np.int32), half_stars
    )


# -- inside


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _parquet(path: Path, names: ColumnNames) -> Iterator[tuple[Any, Any, Any]]:
    first = 1
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _require_columns(path, names, file.schema_arrow.names)
        for batch in file.iter_batches(_BATCH_ROWS, columns=names.all()):
            users, movies = (batch[name].cast(pa.int64()) for name in (names.user, names.movie))
            yield _checked(path, names, users, movies, batch[names.rating].cast(pa.float64()), first)
            first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise RatingsFileError(
            f"ratings file {path}, from row {first} on: {_line(error)}", "Correct the file"
        ) from None


def _checked(path: Path, names: ColumnNames, users: Any, movies: Any, stars: Any, first: int) -> tuple[Any, Any, Any]:
    good = _good(users, movies, stars)
    if not good.all():
        bad = int(np.argmin(good))
        row = {name: column[bad].as_py() for name, column in zip(names.all(), (users, movies, stars), strict=True)}
        reason = _reason(names, {name: "" if value is None else str(value) for name, value in row.items()})
        raise RatingsFileError(f"ratings file {path}, row {first + bad}: {reason}", "Correct the row")
    return _columns(users, movies, stars)


def _csv(path: Path, names: ColumnNames) -> Iterator[tuple[Any, Any, Any]]:
    types = {names.user: pa.int64(), names.movie: pa.int64(), names.rating: pa.float64()}
    try:
        with _text(path) as file:
            header = next(csv.reader(file), [])
        _require_columns(path, names, header)
        reader = pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types, include_columns=names.all()),
        )
        for batch in reader:
            users, movies, stars = (batch[name] for name in names.all())
            if not _good(users, movies, stars).all():
                raise _first_damage(path, names, "a value is out of range")
            yield _columns(users, movies, stars)
    except csv.Error as error:
        raise _malformed(path, 1, str(error)) from None
    except pa.ArrowException as error:
        raise _first_damage(path, names, _line(error)) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _good(users: Any, movies: Any, stars: Any) -> npt.NDArray[np.bool_]:
    """Which rows are ratings."""
    good = np.ones(len(users), np.bool_)
    for ids in (users, movies):
        value = pc.fill_null(ids, 0).to_numpy(zero_copy_only=False)
        good &= (value >= 1) & (value <= ID_MOST)
    doubled = pc.fill_null(stars, 0.0).to_numpy(zero_copy_only=False) * 2
    # NaN is no more than anything
    return np.asarray(
        good & (doubled >= HALF_STARS_MIN) & (doubled <= HALF_STARS_MAX) & (doubled == np.floor(doubled)), np.bool_
    )


def _columns(users: Any, movies: Any, stars: Any) -> tuple[Any, Any, Any]:
    return (
        users.to_numpy().astype(np.int32),
        movies.to_numpy().astype(np.int32),
        (stars.to_numpy() * 2).astype(np.uint8),
    )


def _first_damage(path: Path, names: ColumnNames, otherwise: str) -> RatingsFileError:
    """The first line that is no rating, found by reading the file again, line by line: slow, but it names the line."""
    with _text(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader)
            for row in reader:
                if row:
                    short = f"{len(row)} columns instead of {len(header)}" if len(row) != len(header) else ""
                    reason = short or _reason(names, dict(zip(header, row, strict=True)))
                    if reason:
                        return _malformed(path, reader.line_num, reason)
        except csv.Error as error:
            return _malformed(path, reader.line_num, str(error))
        except OSError as error:
            return _unreadable(path, error)
    return RatingsFileError(f"ratings file {path} cannot be read: {otherwise}", "Correct the file")


def _reason(names: ColumnNames, row: dict[str, str]) -> str:
    """Why a row is no rating; empty when it is one."""
    for name in (names.user, names.movie):
        if id_in(row[name].strip()) is None:
            return f"{name} {reprlib.repr(row[name])} is not a whole number from 1 to {ID_MOST}"
    try:
        stars = float(row[names.rating])
    except ValueError:
        stars = 0.0
    told = reprlib.repr(row[names.rating])
    return "" if stars in _STARS else f"{names.rating} {told} is not one of 0.5, 1.0, … 5.0 stars"


def _require_columns(path: Path, names: ColumnNames, there: list[str]) -> None:
    options: dict[str, str] = {}
    for option, name in (
        ("--user-column", names.user),
        ("--movie-column", names.movie),
        ("--rating-column", names.rating),
    ):
        if name in options:
            raise RatingsFileError(
                f"ratings file {path}: {options[name]} and {option} both name column {name!r}",
                f"Name another with {option}",
            )
        options[name] = option
        if there.count(name) != 1:
            how = "stands twice" if name in there else "is missing"
            raise RatingsFileError(
                f"ratings file {path}, line 1: column {name!r} {how}; the columns are: {', '.join(there)}",
                f"Name the right one with {option}",
            )


def _malformed(path: Path, line: int, reason: str) -> RatingsFileError:
    return RatingsFileError(f"ratings file {path}, line {line}: {reason}", "Correct the line")


def _unreadable(path: Path, error: OSError) -> RatingsFileError:
    return RatingsFileError(
        f"ratings file {path} cannot be read: {_line(error)}",
        "Copy it again if it is cut off; its name must end in .gz, .bz2 or .zst where it is compressed so, and only there",
    )


def _text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(pa.input_stream(path), "utf-8-sig", errors="replace", newline="")


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
