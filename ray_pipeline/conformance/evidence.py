"""A sample beside what is declared, and what several checks need of both: made once, when first asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.conformance.sample import Sample
from ray_pipeline.conformance.scores import ScoreFit, Terms, fit_scores
from ray_pipeline.conformance.world import World

__all__ = ["Evidence", "Known"]

_SCORED_MOST = 1_000_000
"""Ratings whose scores are judged, evenly spread over the sample: more would add time, and precision that nobody can use."""


@dataclass(frozen=True, slots=True)
class Known:
    """The ratings of the sample whose user and movie are declared ones.

    Attributes:
        row: shape (n,), position in the sample.
        user: shape (n,), position in ``World.users``.
        movie: shape (n,), position in ``World.movies``.
        half_stars: shape (n,).
    """

    row: npt.NDArray[np.int64]
    user: npt.NDArray[np.int64]
    movie: npt.NDArray[np.int64]
    half_stars: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.row)

    def spread(self, most: int) -> Known:
        """At most so many of them, evenly spread."""
        if len(self) <= most:
            return self
        chosen = np.linspace(0, len(self) - 1, most).astype(np.int64)
        return Known(self.row[chosen], self.user[chosen], self.movie[chosen], self.half_stars[chosen])


class Evidence:
    """What the checks look at.

    Args:
        sample: what was emitted.
        declared: what it is judged against.
    """

    def __init__(self, sample: Sample, declared: World) -> None:
        self.sample = sample
        self.declared = declared

    @functools.cached_property
    def user_is_declared(self) -> npt.NDArray[np.bool_]:
        """Shape (n,): whether each rating's user is one."""
        return (self.sample.user_ids >= 1) & (self.sample.user_ids <= self.declared.settings.users)

    @functools.cached_property
    def movie(self) -> npt.NDArray[np.int64]:
        """Shape (n,): position of each rating's movie in the declared catalogue, -1 where it is none of it."""
        return self.declared.catalogue.index_of(self.sample.movie_ids)

    @functools.cached_property
    def known(self) -> Known:
        """Ratings of declared users and movies."""
        row = np.flatnonzero(self.user_is_declared & (self.movie >= 0))
        return Known(row, self.sample.user_ids[row] - 1, self.movie[row], self.sample.half_stars[row])

    @functools.cached_property
    def scored(self) -> Known:
        """Those whose scores are judged."""
        return self.known.spread(_SCORED_MOST)

    @functools.cached_property
    def terms(self) -> Terms:
        """The random terms of the scored ratings, each of variance 1, as the seed makes them."""
        return Terms.of(self.declared.unit.users, self.declared.unit.movies, self.scored.user, self.scored.movie)

    @functools.cached_property
    def fit(self) -> ScoreFit | None:
        """Scale of every term, estimated from the ratings; None when there are too few."""
        return fit_scores(self.terms, self.scored.half_stars)

    @functools.cached_property
    def through_ms(self) -> int:
        """Event time up to which every partition is in the sample."""
        last = [
            int(self.sample.timestamps_ms[self.sample.partition == p].max(initial=0))
            for p in range(self.declared.settings.partitions)
        ]
        return min(last)
