"""The movies that drift and attacks name, in a catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.scenario import parse_attack, parse_drift

if TYPE_CHECKING:
    from ray_pipeline.model.catalogue import Catalogue

__all__ = ["attacked_movies", "drifting_movies"]


def drifting_movies(settings: Settings, catalogue: Catalogue) -> tuple[npt.NDArray[np.bool_] | None, ...]:
    """The movies that each drift of the settings is about, shape (movies,); None where it is not about some movies.

    Raises:
        ConfigurationError: a genre or a movie is not in the catalogue.
    """
    found: list[npt.NDArray[np.bool_] | None] = []
    for text in settings.drift:
        scope = parse_drift(text).scope
        if scope.kind == "movie":
            found.append(np.arange(len(catalogue)) == _place(catalogue, "drift", text, scope.movie))
        elif scope.kind == "genre":
            found.append(_of_genre(catalogue, text, scope.genre))
        else:
            found.append(None)
    return tuple(found)


def attacked_movies(settings: Settings, catalogue: Catalogue) -> tuple[int, ...]:
    """Place of the movie that each attack of the settings is against.

    Raises:
        ConfigurationError: it is not in the catalogue.
    """
    return tuple(_place(catalogue, "attack", text, parse_attack(text).movie) for text in settings.attack)


def _place(catalogue: Catalogue, setting: str, text: str, movie_id: int) -> int:
    place = int(catalogue.index_of(np.array([movie_id], np.int64))[0])
    if place < 0:
        raise ConfigurationError(
            f"setting {setting}: {text!r}: movie {movie_id} is not in the catalogue",
            f"It has {len(catalogue):,} movies, with ids from {catalogue.movie_ids[0]} to {catalogue.movie_ids[-1]}",
        )
    return place


def _of_genre(catalogue: Catalogue, text: str, genre: str) -> npt.NDArray[np.bool_]:
    if genre not in catalogue.genre_names:
        raise ConfigurationError(
            f"setting drift: {text!r}: no movie of the catalogue has genre {genre!r}",
            f"Its genres are: {', '.join(catalogue.genre_names) or 'none'}",
        )
    return np.asarray(catalogue.genre_matrix[:, catalogue.genre_names.index(genre)])
