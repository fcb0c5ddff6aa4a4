"""Every rating as a pure function of (seed, configuration, partition, index)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.events import HALF_STARS_MAX, HALF_STARS_MIN
from ray_pipeline.model.arrival import positions
from ray_pipeline.model.attack import Strikes
from ray_pipeline.model.choice import ShardChoice
from ray_pipeline.model.drift import DriftedScores
from ray_pipeline.model.faults import make_faults
from ray_pipeline.model.population import Movies, UserMap, Users, build_users
from ray_pipeline.model.streams import normal_table

__all__ = ["Drawn", "Parts", "ShardModel", "to_half_stars"]

_BLOCK = 4096  # ratings scored at a time: what fits the second-level cache; no effect on any value
_NOISE_BITS = np.uint64(0xFFFF)

Places = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Ratings without their times.

    Attributes:
        user_ids: shape (n,), int64.
        movie_ids: shape (n,), int64.
        scores: shape (n,), float32, stars, before rounding and clipping, noise included; what an attack's rating would have been.
        half_stars: shape (n,), uint8, 1 … 10.
    """

    user_ids: npt.NDArray[np.int64]
    movie_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    half_stars: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Parts:
    """What one score is made of, in stars.

    Attributes:
        user_factors: shape (rank,), float32, scaled so that the dot product is in stars; times the user's scale.
        movie_factors: shape (rank,), float32.
        user_bias: the user's bias, without the mean rating.
        user_scale: how widely the user uses the stars.
        movie_bias: the movie's bias, times the user's scale.
        dot_product: of the factors.
        drift: what drift adds.
        noise: what no predictor can know.
        score: mean rating, biases, dot product, drift and noise together.
        step: 0.5 or 1: what the user's scores are rounded to.
        attack: number of the attack, from 0, that the rating is of; None = of none.
        hit: whether the attack says the rating; else the score does.
    """

    user_factors: npt.NDArray[np.float32]
    movie_factors: npt.NDArray[np.float32]
    user_bias: float
    user_scale: float
    movie_bias: float
    dot_product: float
    drift: float
    noise: float
    score: float
    step: float
    attack: int | None
    hit: bool

    @property
    def nearest_step(self) -> float:
        """The score rounded to half stars, or to whole ones, ties upwards, before it is clipped."""
        return math.floor(self.score / self.step + 0.5) * self.step


class ShardModel:
    """The ratings of one shard, by index.

    Args:
        settings: the event settings are used.
        partition: the shard.
        users: the shard's own users.
        movies: all movies.
        share: the shard's share of all ratings, 0 … 1; needed for what begins somewhere in the stream: arrivals, drift, attacks.

    Attributes:
        faults: what is wrong with its records, on purpose; None = nothing.
        noise_sd: float32, standard deviation of the noise, stars: times an entry of :func:`normal_table`, each equally likely, and
            the user's scale.
    """

    def __init__(
        self, settings: Settings, partition: int, users: Users, movies: Movies, share: float | None = None
    ) -> None:
        self.partition = partition
        self.users = users
        self.movies = movies
        self.faults = make_faults(settings, partition)
        shares = settings.user_bias_share + settings.movie_bias_share + settings.factor_share
        self._mean = settings.mean_rating
        self.noise_sd = np.float32(settings.rating_sd * math.sqrt(max(0.0, 1.0 - shares)))
        scheduled = users.arrivals or movies.arrivals or settings.drift or settings.attack
        if scheduled and share is None:
            msg = "arrivals, drift and attacks need the shard's share of all ratings"
            raise ValueError(msg)
        self._share = share or 1.0
        self._choice = ShardChoice(settings, partition, users, movies, self._share, self.score)
        self._drift = DriftedScores(settings, users.user_ids, movies.drifting) if settings.drift else None

    @classmethod
    def of_shard(cls, settings: Settings, partition: int, user_map: UserMap, movies: Movies) -> ShardModel:
        """The model of a shard, its users made here."""
        users = build_users(settings, user_map.users_of(partition))
        return cls(settings, partition, users, movies, user_map.share(partition))

    def draw(self, first: int, count: int, apart: int = 0) -> Drawn:
        """Ratings ``first … first + count - 1``.

        Args:
            first: index of the first rating, ≥ 0.
            count: how many, ≥ 0.
            apart: others at the same places of the stream, drawn by the counters that lie so far behind those of the shard's own, ≥ 0.
        """
        chosen = self._choice.choose(first, count, apart)
        user, movie, scores, strikes = chosen.user, chosen.movie, chosen.base, chosen.strikes
        if self._drift is not None:
            self._drift.add(scores, user, movie, positions(first, count, self._share))
        scores += self._noise(user, chosen.noise)
        given = scores
        if strikes is not None and self._choice.attacks is not None:
            given = scores.copy()
            given[strikes.rows[strikes.hit]] = self._choice.attacks.stars[strikes.attack[strikes.hit]]
        whole = self.users.habits.whole
        half_stars = to_half_stars(given, None if whole is None else whole.take(user))
        return Drawn(self.users.user_ids.take(user), self.movies.movie_ids.take(movie), scores, half_stars)

    def parts(self, index: int) -> Parts:
        """What the score of one rating is made of."""
        chosen = self._choice.choose(index, 1)
        user, movie, struck = chosen.user, chosen.movie, chosen.strikes
        true = self.score_at(user, movie, np.array([index], np.int64))
        noise = self._noise(user, chosen.noise)
        ours, theirs = self.users.factors[user][0], self.movies.factors[movie][0]
        habits = self.users.habits.of(user)
        scale = 1.0 if habits.scales is None else float(habits.scales[0])
        return Parts(
            ours,
            theirs,
            float(self.users.biases[user][0]) - self._mean,
            scale,
            float(self.movies.biases[movie][0]) * scale,
            float(np.dot(ours, theirs)),
            float((true - chosen.base)[0]),
            float(noise[0]),
            float((true + noise)[0]),
            1.0 if habits.whole is not None and habits.whole[0] else 0.5,
            int(struck.attack[0]) if struck and len(struck.rows) else None,
            bool(struck and struck.hit.any()),
        )

    def score(self, user: Places, movie: Places) -> Scores:
        """Scores without noise and drift, in stars, before rounding and clipping.

        Added rank by rank, so that every CPU rounds alike; BLAS and einsum do not.

        Args:
            user: shape (n,), positions in ``users.user_ids``.
            movie: shape (n,), positions in ``movies.movie_ids``.

        Returns:
            Shape (n,), float32.
        """
        scores = np.empty(len(user), np.float32)
        for lo in range(0, len(user), _BLOCK):
            part = slice(lo, lo + _BLOCK)
            scores[part] = self._score_block(user[part], movie[part])
        return scores

    def score_at(self, user: Places, movie: Places, index: Places) -> Scores:
        """Scores without noise at an index each, shape (n,): :meth:`score` with what drift adds there."""
        scores = self.score(user, movie)
        if self._drift is not None:
            self._drift.add(scores, user, movie, index / self._share)
        return scores

    def drift_at(self, user: Places, movie: Places, index: Places) -> Scores:
        """What drift adds to a score at an index each, stars, shape (n,)."""
        shift = np.zeros(len(user), np.float32)
        if self._drift is not None:
            self._drift.add(shift, user, movie, index / self._share)
        return shift

    def attacks(self, first: int, count: int) -> Strikes | None:
        """Which of the ratings ``first … first + count - 1`` belong to attacks; None when no attack goes on there."""
        return self._choice.attacks.strikes(first, count) if self._choice.attacks else None

    def hits(self, index: Places) -> npt.NDArray[np.bool_]:
        """Whether each rating, shape (n,), is one that an attack gives its movie; false where the index is below 0.

        Fast where the indexes lie close together; each that lies apart costs about 0.1 ms while an attack goes on.
        """
        return self._struck(index)[0]

    def struck(self, index: Places) -> npt.NDArray[np.bool_]:
        """Whether each rating, shape (n,), is one of an attack, camouflage included; see :meth:`hits`."""
        return self._struck(index)[1]

    # -- inside

    def _struck(self, index: Places) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        hit, struck = np.zeros(len(index), np.bool_), np.zeros(len(index), np.bool_)
        if self._choice.attacks is None:
            return hit, struck
        block = index // _BLOCK
        for number in np.unique(block[index >= 0]).tolist():
            strikes = self._choice.attacks.strikes(number * _BLOCK, _BLOCK)
            if strikes is not None:
                mine = block == number
                rows = index[mine] - number * _BLOCK
                hit[mine], struck[mine] = np.isin(rows, strikes.rows[strikes.hit]), np.isin(rows, strikes.rows)
        return hit, struck

    def _score_block(self, user: Places, movie: Places) -> Scores:
        # take is twice as fast as indexing
        product = self.users.factors.take(user, axis=0)
        product *= self.movies.factors.take(movie, axis=0)
        score: Scores = self.movies.biases.take(movie)
        if self.users.habits.scales is not None:
            score *= self.users.habits.scales.take(user)
        score += self.users.biases.take(user)
        for column in range(product.shape[1]):
            score += product[:, column]
        return score

    def _noise(self, user: Places, word: npt.NDArray[np.uint64]) -> Scores:
        noise: Scores = self.noise_sd * normal_table().take(word & _NOISE_BITS)
        if self.users.habits.scales is not None:
            noise *= self.users.habits.scales.take(user)
        return noise


def to_half_stars(scores: npt.NDArray[np.float32], whole: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.uint8]:
    """Round to the nearest half star, or whole one, ties upwards, and clip to 0.5 … 5.0, or 1 … 5.

    Args:
        scores: shape (n,), float32, stars.
        whole: shape (n,), which are by users who give whole stars only; None = none.

    Returns:
        Shape (n,), uint8, half stars, 1 … 10.
    """
    rounded = np.floor(scores * np.float32(2.0) + np.float32(0.5))
    half_stars = np.asarray(np.clip(rounded, HALF_STARS_MIN, HALF_STARS_MAX), np.uint8)
    if whole is not None:
        stars = np.clip(np.floor(scores.compress(whole) + np.float32(0.5)), 1, HALF_STARS_MAX // 2)
        half_stars[whole] = stars * 2
    return half_stars
