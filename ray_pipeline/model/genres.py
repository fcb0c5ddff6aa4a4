"""Movies of a genre lie near each other: the part of the factors that comes from the genres."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt

from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.model.streams import halfwords, normal_table

__all__ = ["with_genres"]


def with_genres(
    factors: npt.NDArray[np.float32], catalogue: Catalogue, seed: int, share: float
) -> npt.NDArray[np.float32]:
    """Factors of which a share of the variance comes from the movie's genres.

    Each genre has a vector of its own; a movie of k genres has their sum over √k. These are centred over the catalogue and scaled to a
    mean square of 1, so that the variance of the whole stays what it was. A movie without genres keeps its own factors.

    Args:
        factors: shape (n, rank), float32, standard normal.
        catalogue: the genres.
        seed: the run's.
        share: of the variance, 0 … 1.

    Returns:
        Shape (n, rank), float32.
    """
    rank = factors.shape[1]
    counted = Counter(catalogue.genres)
    kinds = sorted(names for names in counted if names)
    if not kinds:
        return factors
    own = {name: normal_table()[halfwords(seed, f"genre/factors/{name}", 0, rank)].tolist() for name in _names(kinds)}
    columns = [[sum(own[name][r] for name in names) / math.sqrt(len(names)) for names in kinds] for r in range(rank)]
    weights = [counted[names] for names in kinds]
    total = sum(weights)
    # exactly rounded sums, so that every machine has the same
    means = [math.fsum(w * x for w, x in zip(weights, column, strict=True)) / total for column in columns]
    centred = [[x - mean for x in column] for column, mean in zip(columns, means, strict=True)]
    square = math.fsum(w * x * x for column in centred for w, x in zip(weights, column, strict=True)) / (total * rank)
    scale = math.sqrt(share / square) if square else 0.0
    table = np.zeros((len(kinds) + 1, rank), np.float32)
    table[1:] = np.array(centred).T * scale
    place = {names: i for i, names in enumerate(kinds, 1)}
    kind = np.array([place.get(names, 0) for names in catalogue.genres], np.int64)
    rest = np.where(kind > 0, np.float32(math.sqrt(1.0 - share)), np.float32(1.0))
    mixed: npt.NDArray[np.float32] = factors * rest[:, None] + table[kind]
    return mixed


def _names(kinds: list[tuple[str, ...]]) -> list[str]:
    return sorted({name for names in kinds for name in names})
