"""Who rates what at an index: activity and sessions choose the user, popularity and taste the movie, arrivals and attacks interfere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.model.arrival import Joining, positions
from ray_pipeline.model.attack import Attacks, Strikes
from ray_pipeline.model.exposure import LOOKS, Exposure
from ray_pipeline.model.population import Movies, Users
from ray_pipeline.model.sessions import Sessions
from ray_pipeline.model.streams import pairs, words

__all__ = ["Chosen", "ShardChoice"]

_BLOCK = 4096  # ratings looked at together: what fits the second-level cache; no effect on any value

Places = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Who rates what.

    Attributes:
        user: shape (n,), int64, places of the users.
        movie: shape (n,), int64, places of the movies.
        base: shape (n,), float32: their scores without noise and drift.
        noise: shape (n,), uint64: words whose low 16 bits are the noise.
        strikes: the attacks' ratings among them; None when no attack goes on.
    """

    user: Places
    movie: Places
    base: Scores
    noise: Words
    strikes: Strikes | None


class ShardChoice:
    """The users and movies of one shard's ratings, by index.

    Counter n of the shard's stream "events" makes rating n: word 0 its user, word 1 its movie, the low 16 bits of word 2 its noise, the
    high 32 the coin of its session. What is drawn besides has streams of its own, made only where a setting asks for it.

    Args:
        settings: the event settings are used.
        partition: the shard.
        users: the shard's users.
        movies: all movies.
        share: the shard's share of all ratings.
        score: scores of users and movies, by place, without noise and drift.
    """

    def __init__(
        self,
        settings: Settings,
        partition: int,
        users: Users,
        movies: Movies,
        share: float,
        score: Callable[[Places, Places], Scores],
    ) -> None:
        self._seed, self._partition, self._share = settings.seed, partition, share
        self._users, self._movies, self._score = users, movies, score
        self._exposure = Exposure(settings) if settings.taste_exposure else None
        self._sessions = Sessions(settings.session_length) if settings.session_length > 1 else None
        self.attacks: Attacks | None = None
        if settings.attack:
            founders = users.arrivals.joins == 0 if users.arrivals else None
            self.attacks = Attacks(settings, partition, users.user_ids, founders, share, movies.attacked)

    def choose(self, first: int, count: int, apart: int = 0) -> Chosen:
        """Who rates what at the indexes ``first … first + count - 1``, by the counters that lie so far behind them."""
        counter = first + apart
        lo = counter if self._sessions is None else self._sessions.lookback(counter)
        lead = counter - lo
        drawn = words(self._seed, "events", self._partition, lo, lead + count)
        at, spare = self._spare(lo, lead + count, apart)
        begin = slice(None) if self._sessions is None else self._sessions.begins(lo, counter, drawn[:, 2])
        user = self._users.activity.draw(drawn[begin, 0])
        if at is not None and self._users.arrivals:
            user = Joining(self._users.arrivals, at[begin], spare[begin, 0]).settled(user)
        movie = self._movies.popularity.draw(drawn[lead:, 1])
        joining = None
        if at is not None and self._movies.arrivals:
            joining = Joining(self._movies.arrivals, at[lead:], spare[lead:, 1])
        if self._exposure is not None:
            base = self._look_around(self._exposure, counter, user, movie, joining)
        else:
            movie = joining.settled(movie) if joining else movie
            base = self._score(user, movie)
        return Chosen(user, movie, base, drawn[lead:, 2], self._strike(first, user, movie, base, apart))

    def _spare(self, counter: int, count: int, apart: int) -> tuple[npt.NDArray[np.float64] | None, Words]:
        """Positions, and words for founders, while somebody has yet to join; None from then on."""
        known, first = (self._users.arrivals, self._movies.arrivals), counter - apart
        if first / self._share >= max((arrivals.last for arrivals in known if arrivals), default=0.0):
            return None, np.empty((0, 2), np.uint64)
        spare = pairs(self._seed, "events/joining", self._partition, counter, count)
        # a session that lies apart may reach back behind the beginning
        return np.maximum(positions(first, count, self._share), 0.0), spare

    def _look_around(
        self, exposure: Exposure, counter: int, user: Places, movie: Places, joining: Joining | None
    ) -> Scores:
        """Put other movies in the place of those that are passed over; returns the base scores."""
        more = words(self._seed, "events/exposure", self._partition, counter, len(user))
        base = np.empty(len(user), np.float32)
        for lo in range(0, len(user), _BLOCK):
            part = slice(lo, lo + _BLOCK)
            looking = None if joining is None else joining.at(part)
            self._look_block(exposure, user[part], movie[part], base[part], more[part], looking)
        return base

    def _look_block(
        self, exposure: Exposure, user: Places, movie: Places, base: Scores, more: Words, joining: Joining | None
    ) -> None:
        rows, who, what, decision = np.arange(len(user)), user, movie, more[:, LOOKS - 1]
        base[:] = score = self._score(user, movie)
        for look in range(LOOKS - 1):
            passed = exposure.passes(look, self._taste(who, score), decision)
            if joining is not None:
                passed |= ~joining.there(what, rows)
            again = np.flatnonzero(passed)
            rows, who, decision = rows.take(again), who.take(again), decision.take(again)
            what = self._movies.popularity.draw(more[:, look].take(rows))
            score = self._score(who, what)
            movie[rows], base[rows] = what, score
        if joining is not None:
            again = np.flatnonzero(~joining.there(what, rows))
            rows = rows.take(again)
            movie[rows] = joining.founders(rows)
            base[rows] = self._score(who.take(again), movie[rows])

    def _taste(self, user: Places, base: Scores) -> Scores:
        """What is the user's taste and the movie's bias in some scores, on the scale that all users have alike."""
        taste = base - self._users.biases.take(user)
        scales = self._users.habits.scales
        return taste if scales is None else taste / scales.take(user)

    def _strike(self, first: int, user: Places, movie: Places, base: Scores, apart: int) -> Strikes | None:
        """Put the attacks' ratings in their places."""
        strikes = self.attacks.strikes(first, len(user), apart) if self.attacks else None
        if strikes is None or self.attacks is None:
            return None
        rows, hit = strikes.rows, strikes.hit
        user[rows] = strikes.user
        movie[rows[hit]] = self.attacks.movies[strikes.attack[hit]]
        base[rows] = self._score(strikes.user, movie[rows])
        return strikes
