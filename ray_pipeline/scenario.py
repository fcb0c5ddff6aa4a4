"""What drift and attacks are, and the small texts that settings name them with.

A text is a kind and ``name=value`` pairs, such as ``abrupt at=100000 genre=Horror size=-1.0``; a value with spaces stands in
quotes. Positions count the ratings of all shards from the run's beginning.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

__all__ = ["Attack", "Drift", "Scope", "parse_attack", "parse_drift"]

_POSITION_MOST = 10**15
_SCOPES = ("genre", "cohort", "movie")
# kind of drift → the positions it must name, and what may be left out
_DRIFTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "abrupt": (("at",), ("to",)),
    "gradual": (("from", "to"), ()),
    "recurring": (("period",), ("from", "to", "on")),
}
_ATTACK_NEEDS = ("movie", "at", "ratings")
_ATTACK_MAY = ("cohort", "rating", "stealth", "intensity")


@dataclass(frozen=True, slots=True)
class Scope:
    """Which ratings a drift is about: of all, of a genre, by a cohort of users, or of a movie.

    Attributes:
        kind: what is meant.
        genre: name of the genre; empty for other kinds.
        cohort: share of the users, 0 … 1; 0 for other kinds.
        movie: id of the movie; 0 for other kinds.
    """

    kind: Literal["all", "genre", "cohort", "movie"] = "all"
    genre: str = ""
    cohort: float = 0.0
    movie: int = 0


@dataclass(frozen=True, slots=True)
class Drift:
    """A shift of the scores that begins somewhere in the stream.

    Attributes:
        kind: ``abrupt`` (all of it from ``start`` on), ``gradual`` (grows from ``start`` to ``end``, and stays), or
            ``recurring`` (there for the first part, ``on``, of every period).
        scope: the ratings it is about.
        size: the shift, stars.
        start: position of the first rating that may be shifted.
        end: position where it is over (abrupt, recurring) or complete (gradual); None = never over.
        period: length of a recurring drift's period, in ratings; 0 for other kinds.
        on: share of the period in which a recurring drift is there, 0 … 1.
        text: as it was given.
    """

    kind: Literal["abrupt", "gradual", "recurring"]
    scope: Scope
    size: float
    start: int
    end: int | None
    period: int
    on: float
    text: str


@dataclass(frozen=True, slots=True)
class Attack:
    """A cohort of users that gives one movie one rating.

    Attributes:
        movie: id of the movie.
        start: position at which it begins.
        ratings: how many ratings the cohort gives in it, on average over seeds.
        cohort: share of the users that take part, 0 … 1.
        rating: what they give the movie, stars; who gives whole ones only rounds it, ties upwards.
        stealth: share of their ratings that are camouflage: of other movies, with their honest opinion.
        intensity: share of the stream that is the attack's while it lasts, so it lasts for ``ratings / intensity`` ratings.
        text: as it was given.
    """

    movie: int
    start: int
    ratings: int
    cohort: float
    rating: float
    stealth: float
    intensity: float
    text: str

    @property
    def end(self) -> int:
        """Position at which it is over."""
        return self.start + math.ceil(self.ratings / self.intensity)


def parse_drift(text: str) -> Drift:
    """A drift from its text.

    That is ``abrupt at= [to=]``, ``gradual from= to=`` or ``recurring period= [from= to= on=]``, each with ``size=`` and at most one of
    ``genre=``, ``cohort=``, ``movie=``.

    Raises:
        ValueError: the text is none; says what is wrong.
    """
    kind, given = _pairs(text, tuple(_DRIFTS))
    needed, optional = _DRIFTS[kind]
    _check_names(text, given, (*needed, "size"), (*optional, *_SCOPES))
    named = [name for name in _SCOPES if name in given]
    if len(named) > 1:
        raise _wrong(text, f"{named[0]} and {named[1]} exclude each other")
    start = _position(text, given, "at" if kind == "abrupt" else "from", 0)
    end = _position(text, given, "to", None)
    if end is not None and end <= (start or 0):
        raise _wrong(text, f"to={end} is not behind the beginning, {start}")
    size = _number(text, given, "size", 0.0, -5.0, 5.0)
    if size == 0:
        raise _wrong(text, "size=0 shifts nothing")
    period = _position(text, given, "period", 0) or 0
    if kind == "recurring" and period < 2:
        raise _wrong(text, "period must be at least 2 ratings")
    on = _number(text, given, "on", 0.5, 0.0, 1.0)
    if not 0 < on < 1:
        raise _wrong(text, "on must be more than 0 and less than 1")
    shape = cast(Literal["abrupt", "gradual", "recurring"], kind)
    return Drift(shape, _scope(text, given), size, start or 0, end, period, on, text)


def parse_attack(text: str) -> Attack:
    """An attack from its text: ``review-bomb movie= at= ratings= [rating=0.5 cohort=0.01 stealth=0 intensity=0.1]``.

    Raises:
        ValueError: the text is none; says what is wrong.
    """
    _, given = _pairs(text, ("review-bomb",))
    _check_names(text, given, _ATTACK_NEEDS, _ATTACK_MAY)
    rating = _number(text, given, "rating", 0.5, 0.5, 5.0)
    if (rating * 2) % 1:
        raise _wrong(text, f"rating={given['rating']} is no half star")
    cohort, intensity = _share(text, given, "cohort", 0.01), _share(text, given, "intensity", 0.1)
    stealth = _number(text, given, "stealth", 0.0, 0.0, 1.0)
    if stealth == 1:
        raise _wrong(text, "stealth=1 leaves no attack")
    start, ratings = _position(text, given, "at", 0) or 0, _position(text, given, "ratings", 0) or 0
    if ratings < 1:
        raise _wrong(text, "ratings must be at least 1")
    return Attack(_movie(text, given), start, ratings, cohort, rating, stealth, intensity, text)


def _pairs(text: str, kinds: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    try:
        kind, *pairs = shlex.split(text) or [""]
    except ValueError as error:
        raise _wrong(text, str(error)) from None
    if kind not in kinds:
        raise _wrong(text, f"it begins with {kind!r}, not with {' or '.join(kinds)}")
    given: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise _wrong(text, f"{pair!r} is not name=value")
        if name in given:
            raise _wrong(text, f"{name} is given twice")
        given[name] = value
    return kind, given


def _check_names(text: str, given: Mapping[str, str], needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    for name in given:
        if name not in needed and name not in optional:
            raise _wrong(text, f"{name} is unknown here: there are {', '.join((*needed, *optional))}")
    for name in needed:
        if name not in given:
            raise _wrong(text, f"{name}= is missing")


def _scope(text: str, given: Mapping[str, str]) -> Scope:
    if "genre" in given:
        return Scope("genre", genre=given["genre"])
    if "cohort" in given:
        return Scope("cohort", cohort=_share(text, given, "cohort", 0.0))
    return Scope("movie", movie=_movie(text, given)) if "movie" in given else Scope()


def _movie(text: str, given: Mapping[str, str]) -> int:
    found = _position(text, given, "movie", None)
    if not found:
        raise _wrong(text, f"movie={given['movie']} is no movie's id")
    return found


def _position(text: str, given: Mapping[str, str], name: str, default: int | None) -> int | None:
    if name not in given:
        return default
    digits = given[name].replace("_", "").replace(",", "")
    if not digits.isascii() or not digits.isdigit() or int(digits) > _POSITION_MOST:
        raise _wrong(text, f"{name}={given[name]} is not a whole number from 0 to {_POSITION_MOST:,}")
    return int(digits)


def _number(text: str, given: Mapping[str, str], name: str, default: float, least: float, most: float) -> float:
    try:
        value = float(given.get(name, default))
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise _wrong(text, f"{name}={given[name]} is not a number from {least:g} to {most:g}")
    return value


def _share(text: str, given: Mapping[str, str], name: str, default: float) -> float:
    value = _number(text, given, name, default, 0.0, 1.0)
    if value == 0 and name in given:
        raise _wrong(text, f"{name}=0 leaves nobody")
    return value


def _wrong(text: str, reason: str) -> ValueError:
    return ValueError(f"{text!r}: {reason}")
