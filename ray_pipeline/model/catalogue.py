"""The movies: a built-in catalogue made deterministically, a file in MovieLens's layout, or those of a fitted model."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import reprlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.errors import CatalogueError
from ray_pipeline.events import ID_MOST, id_in
from ray_pipeline.fitted import load_fitted
from ray_pipeline.model.scopes import attacked_movies, drifting_movies
from ray_pipeline.model.streams import words

__all__ = ["Catalogue", "load_catalogue"]

_GENRES = (
    "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "IMAX", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
# out of 100: how often a genre is a movie's first one, roughly as in MovieLens's catalogue
_GENRE_WEIGHTS = (9, 6, 3, 3, 18, 6, 6, 24, 3, 1, 6, 1, 2, 3, 4, 2, 2, 1, 1)
_ADJECTIVES = (
    "Silent", "Crimson", "Broken", "Golden", "Hidden", "Last", "Distant", "Burning", "Frozen", "Lonely", "Electric",
    "Paper", "Hollow", "Velvet", "Restless", "Borrowed", "Endless", "Quiet", "Savage", "Gentle", "Invisible", "Midnight",
    "Northern", "Forgotten", "Wandering", "Painted", "Iron", "Secret", "Second", "Winter", "Summer", "Reluctant",
)  # fmt: skip
_NOUNS = (
    "Harbor", "Orchard", "Letter", "River", "Kingdom", "Engine", "Garden", "Horizon", "Mirror", "Station", "Promise",
    "Lantern", "Voyage", "Shadow", "Symphony", "Desert", "Bridge", "Comet", "Detective", "Island", "Machine", "Neighbor",
    "Oracle", "Parade", "Quarry", "Rebellion", "Sparrow", "Tide", "Umbrella", "Valley", "Witness", "Zeppelin",
)  # fmt: skip
_PATTERNS = (
    "The {a} {n}", "{a} {n}", "Her {a} {n}", "{n} of the {a} {m}", "The {n} and the {m}", "{a} {n}, {b} {m}",
    "Return to the {a} {n}", "{n} Without a {m}",
)  # fmt: skip
_NO_GENRES = "(no genres listed)"
_CATALOGUE_STREAM_SEED = 0  # the built-in catalogue is the same for every run's seed


class Catalogue:
    """Movies in ascending order of id.

    Args:
        movie_ids: shape (n,), int64, ascending, distinct, ≥ 1.
        titles: n titles, or a function that makes them when first asked for.
        genres: n tuples of genre names, or a function that makes them.
        digest: names the content.
    """

    def __init__(
        self,
        movie_ids: npt.NDArray[np.int64],
        titles: tuple[str, ...] | functools.partial[tuple[str, ...]],
        genres: tuple[tuple[str, ...], ...] | functools.partial[tuple[tuple[str, ...], ...]],
        digest: str,
    ) -> None:
        self.movie_ids = movie_ids
        self.digest = digest
        self._titles = titles
        self._genres = genres

    def __len__(self) -> int:
        return len(self.movie_ids)

    @functools.cached_property
    def titles(self) -> tuple[str, ...]:
        """The title of each movie, with its year."""
        return self._titles if isinstance(self._titles, tuple) else self._titles()

    @functools.cached_property
    def genres(self) -> tuple[tuple[str, ...], ...]:
        """The genres of each movie; an empty tuple where none is known."""
        return self._genres if isinstance(self._genres, tuple) else self._genres()

    @functools.cached_property
    def genre_names(self) -> tuple[str, ...]:
        """All genres, sorted."""
        return tuple(sorted({name for names in self.genres for name in names}))

    @functools.cached_property
    def genre_matrix(self) -> npt.NDArray[np.bool_]:
        """Shape (n, number of genres): movie i has genre j."""
        column = {name: j for j, name in enumerate(self.genre_names)}
        matrix = np.zeros((len(self), len(column)), np.bool_)
        for i, names in enumerate(self.genres):
            matrix[i, [column[name] for name in names]] = True
        return matrix

    def index_of(self, movie_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Position of each id in this catalogue, -1 where it is not in it.

        Args:
            movie_ids: any shape, int64.
        """
        position = np.minimum(np.searchsorted(self.movie_ids, movie_ids), len(self.movie_ids) - 1)
        return np.where(self.movie_ids[position] == movie_ids, position, -1)

    def title_of(self, movie_id: int) -> str | None:
        """The title of one movie, None when the catalogue does not have it."""
        position = int(self.index_of(np.array([movie_id], np.int64))[0])
        return None if position < 0 else self.titles[position]


def load_catalogue(settings: Settings) -> Catalogue:
    """The catalogue that the settings name.

    Raises:
        CatalogueError: the file is missing or cannot be read, or a row is malformed; names the line.
        ConfigurationError: the model file is missing or damaged, or drift or an attack of the settings names a movie or a genre
            that there is not.
    """
    if settings.model is not None:
        fitted = load_fitted(settings.model)
        found = Catalogue(fitted.movies.ids, fitted.titles, fitted.genres, fitted.digest)
    else:
        found = _builtin(settings.movies) if settings.catalog is None else _from_file(settings.catalog)
    drifting_movies(settings, found)
    attacked_movies(settings, found)
    return found


@functools.lru_cache(maxsize=2)
def _builtin(count: int) -> Catalogue:
    return Catalogue(
        np.arange(1, count + 1, dtype=np.int64),
        functools.partial(_builtin_titles, count),
        functools.partial(_builtin_genres, count),
        f"builtin-1-{count}",
    )


def _builtin_titles(count: int) -> tuple[str, ...]:
    drawn = words(_CATALOGUE_STREAM_SEED, "catalogue/titles", 0, 0, count).view("<u2").reshape(count, -1)
    seen: dict[str, int] = {}
    titles = []
    for pattern, a, b, n, m, year in drawn[:, :6].tolist():
        name = _PATTERNS[pattern % len(_PATTERNS)].format(
            a=_ADJECTIVES[a % 32], b=_ADJECTIVES[b % 32], n=_NOUNS[n % 32], m=_NOUNS[(n + 1 + m % 31) % 32]
        )
        seen[name] = part = seen.get(name, 0) + 1
        titles.append(f"{name}{f' {part}' if part > 1 else ''} ({1930 + year % 86})")
    return tuple(titles)


def _builtin_genres(count: int) -> tuple[tuple[str, ...], ...]:
    drawn = words(_CATALOGUE_STREAM_SEED, "catalogue/genres", 0, 0, count).view("<u2").reshape(count, -1)
    law = np.repeat(np.arange(len(_GENRES)), _GENRE_WEIGHTS)
    chosen = law[drawn[:, :3] % len(law)].tolist()
    how_many = (1 + (drawn[:, 3] % 10 >= 4) + (drawn[:, 3] % 10 >= 8)).tolist()
    return tuple(tuple(sorted({_GENRES[g] for g in row[:k]})) for row, k in zip(chosen, how_many, strict=True))


def _from_file(path: Path) -> Catalogue:
    with CatalogueError.reading(path, "catalogue", "movies.csv", "--catalog"):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise CatalogueError(
            problem=f"catalogue {path}, line {line}: not UTF-8", fix="Save the file in UTF-8"
        ) from None
    rows: dict[int, tuple[str, tuple[str, ...]]] = {}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # str.splitlines cuts titles with rarer line ends
    try:
        header = next(reader, None)
        if header != ["movieId", "title", "genres"]:
            raise _malformed(path, 1, f"the header is {header}, not movieId,title,genres")
        for row in reader:
            movie_id, title, genres = _parse_row(path, reader.line_num, row)
            if movie_id in rows:
                raise _malformed(path, reader.line_num, f"movieId {movie_id} stands twice")
            rows[movie_id] = (title, genres)
    except csv.Error as error:
        raise _malformed(path, reader.line_num, str(error)) from None
    if not rows:
        raise _malformed(path, 2, "there is no movie")
    ids = sorted(rows)
    return Catalogue(
        np.array(ids, np.int64),
        tuple(rows[i][0] for i in ids),
        tuple(rows[i][1] for i in ids),
        hashlib.sha256(content).hexdigest()[:16],
    )


def _parse_row(path: Path, line: int, row: list[str]) -> tuple[int, str, tuple[str, ...]]:
    if len(row) != 3:
        raise _malformed(path, line, f"{len(row)} columns instead of 3 (movieId,title,genres)")
    number, title, genres = row
    movie_id = id_in(number)
    if movie_id is None:
        raise _malformed(path, line, f"movieId {reprlib.repr(number)} is not a whole number from 1 to {ID_MOST}")
    if not title.strip():
        raise _malformed(path, line, "the title is empty")
    names = () if genres in ("", _NO_GENRES) else tuple(sorted(set(genres.split("|"))))
    if any(not name.strip() for name in names):
        raise _malformed(path, line, f"genres {genres!r} have an empty name")
    return movie_id, title, names


def _malformed(path: Path, line: int, reason: str) -> CatalogueError:
    return CatalogueError(problem=f"catalogue {path}, line {line}: {reason}", fix="Correct the line")
