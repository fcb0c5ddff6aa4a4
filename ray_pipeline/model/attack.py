"""Attacks: ratings of the stream that a cohort of users gives to hurt, or to push, one movie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.model.cohort import cohort
from ray_pipeline.model.streams import pairs
from ray_pipeline.scenario import Attack, parse_attack

__all__ = ["Attacks", "Strikes"]

_HALF_WORD = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFF_FFFF)


@dataclass(frozen=True, slots=True)
class Strikes:
    """Which of some consecutive ratings belong to attacks.

    Attributes:
        rows: shape (k,), int64, ascending: their places.
        attack: shape (k,), int64: which attack of the settings.
        user: shape (k,), int64: place of the cohort's user who gives it.
        hit: shape (k,): against the movie; else camouflage.
    """

    rows: npt.NDArray[np.int64]
    attack: npt.NDArray[np.int64]
    user: npt.NDArray[np.int64]
    hit: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Planned:
    attack: Attack
    members: npt.NDArray[np.int64]
    threshold: np.uint64
    camouflage: np.uint64


class Attacks:
    """The attacks' ratings of one shard.

    While an attack lasts, each rating of the stream is one of its own with probability ``intensity``, by a word of its own; of
    several attacks the one named last has it.

    Args:
        settings: the event settings are used.
        partition: the shard.
        user_ids: shape (n,), int64, the shard's users.
        founders: shape (n,), who may take part; None = all.
        share: the shard's share of all ratings.
        movies: result of :func:`ray_pipeline.model.scopes.attacked_movies`.

    Attributes:
        movies: shape (attacks,), int64, place of the movie that each is against.
        stars: shape (attacks,), float32: what each gives it; a user of whole stars rounds it, as any score.
    """

    def __init__(
        self,
        settings: Settings,
        partition: int,
        user_ids: npt.NDArray[np.int64],
        founders: npt.NDArray[np.bool_] | None,
        share: float,
        movies: tuple[int, ...],
    ) -> None:
        self._seed, self._partition, self._share = settings.seed, partition, share
        self._planned = []
        for number, text in enumerate(settings.attack):
            attack = parse_attack(text)
            member = cohort(settings.seed, f"attack/{number}/cohort", user_ids, attack.cohort, founders)
            intensity, stealth = round(attack.intensity * 2**32), round(attack.stealth * 2**32)
            self._planned.append(_Planned(attack, np.flatnonzero(member), np.uint64(intensity), np.uint64(stealth)))
        self.movies = np.array(movies, np.int64)
        self.stars = np.array([p.attack.rating for p in self._planned], np.float32)

    def strikes(self, first: int, count: int, apart: int = 0) -> Strikes | None:
        """The attacks' ratings among ``first … first + count - 1``, drawn so far behind them; None when no attack goes on there."""
        begin, end = first / self._share, (first + count) / self._share
        going_on = [n for n, p in enumerate(self._planned) if p.attack.start <= end and p.attack.end > begin]
        if not going_on:
            return None
        attack = np.full(count, -1, np.int64)
        user, hit = np.zeros(count, np.int64), np.zeros(count, np.bool_)
        for number in going_on:
            planned = self._planned[number]
            drawn = pairs(self._seed, f"attack/{number}", self._partition, first + apart, count)
            rows = np.flatnonzero((drawn[:, 0] >> _HALF_WORD) < planned.threshold)
            at = (first + rows) / self._share
            rows = rows[(at >= planned.attack.start) & (at < planned.attack.end)]
            attack[rows] = number
            place = ((drawn[rows, 1] >> _HALF_WORD) * np.uint64(len(planned.members))) >> _HALF_WORD
            user[rows] = planned.members[place.astype(np.int64)]
            hit[rows] = (drawn[rows, 0] & _LOW_HALF) >= planned.camouflage
        rows = np.flatnonzero(attack >= 0)
        return Strikes(rows, attack[rows], user[rows], hit[rows])
