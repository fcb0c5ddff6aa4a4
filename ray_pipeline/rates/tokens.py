"""The words and numbers of a plan's text, a token ahead; what is wrong is said with its place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import tzinfo
from fractions import Fraction

from ray_pipeline.errors import PlanError
from ray_pipeline.rates.cron import zone_of
from ray_pipeline.rates.shapes import NANO

__all__ = ["LEAST_PERIOD_MS", "MOST_RATE", "Token", "Tokens"]

MOST_RATE = 10_000_000
"""The highest rate a plan may reach, ratings per second."""

LEAST_PERIOD_MS = 100
"""The shortest time from one burst, wave or round to the next."""

_MOST_LENGTH_MS = 366 * 86_400_000
_AROUND = 24

_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_PER_S = {"s": 1, "m": 60, "min": 60, "h": 3600}
_NUMBER = r"\d[\d_]*(?:\.\d+)?"
_LENGTH_PART = rf"({_NUMBER})(ms|min|[smhdw])"
_TOKEN = re.compile(
    rf"""\s*(?:
      (?P<length>(?:{_NUMBER}(?:ms|min|[smhdw]))+(?![A-Za-z0-9_.]))
    | (?P<number>{_NUMBER})
    | (?P<name>[A-Za-z]+)
    | (?P<text>"[^"]*"|'[^']*')
    | (?P<sign>\.\.|[()+,=/])
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Token:
    """A word, number or sign.

    Attributes:
        kind: ``length``, ``number``, ``name``, ``text``, ``sign`` or ``end``.
        text: as it was written.
        at: its place in the plan, from 0.
    """

    kind: str
    text: str
    at: int


class Tokens:
    """A plan's text, read from left to right. What is asked for and not there raises :class:`PlanError`.

    Args:
        text: the plan.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split()
        self._next = 0

    @property
    def now(self) -> Token:
        """The next token."""
        return self._tokens[self._next]

    def take(self) -> Token:
        """Move past the next token."""
        self._next += 1
        return self._tokens[self._next - 1]

    def took(self, text: str) -> bool:
        """Move past the next token if it is this one."""
        if self.now.text != text or self.now.kind == "text":
            return False
        self.take()
        return True

    def expect(self, text: str, how: str) -> None:
        """Move past the next token, which must be this one; ``how`` shows how it is written."""
        if not self.took(text):
            raise self.wrong(f'"{text}"; write {how}')

    def wrong(self, expected: str, token: Token | None = None) -> PlanError:
        """What is wrong with a token, the next one when none is given."""
        token = token or self.now
        text, at = self._text.replace("\n", " "), token.at
        before = ("…" if at > _AROUND else "") + text[max(0, at - _AROUND) : at]
        rest = text[at : at + _AROUND] + ("…" if len(text) > at + _AROUND else "")
        found = {"end": "the end", "text": token.text}.get(token.kind, f'"{token.text}"')
        return PlanError(f"the plan, character {at + 1}: expected {expected}, found {found} in: {before}▶{rest}")

    # -- values

    def rate(self) -> int:
        """A rate, per ``NANO`` seconds."""
        token = self._of_kind("number", "a rate such as 500 or 30/min")
        rate = Fraction(token.text.replace("_", ""))
        if self.took("/"):
            unit = self.now
            if unit.text not in _PER_S:
                raise self.wrong("s, min or h")
            rate /= _PER_S[self.take().text]
        found = round(rate * NANO)
        if found > MOST_RATE * NANO or (rate and not found):
            raise self.wrong(f"a rate of at most {MOST_RATE:,}/s that is 0 or at least 0.000000001/s", token)
        return found

    def length(self) -> int:
        """A length, milliseconds."""
        token = self._of_kind("length", "a length such as 10m or 1h30m")
        parts = re.findall(_LENGTH_PART, token.text)
        found = sum(Fraction(number.replace("_", "")) * _UNITS_MS[unit] for number, unit in parts)
        if not 1 <= found <= _MOST_LENGTH_MS:
            raise self.wrong("a length from 1ms to 366d", token)
        return round(found)

    def period(self) -> int:
        """A length that is not too short to be repeated, milliseconds."""
        token, found = self.now, self.length()
        if found < LEAST_PERIOD_MS:
            raise self.wrong(f"at least {LEAST_PERIOD_MS}ms from one to the next", token)
        return found

    def count(self) -> int:
        """A whole number."""
        token = self._of_kind("number", "a whole number from 1 to 1000000")
        if not token.text.isdigit() or not 1 <= int(token.text) <= 1_000_000:
            raise self.wrong("a whole number from 1 to 1000000", token)
        return int(token.text)

    def quoted(self) -> str:
        """A text in quotes, without them."""
        return self._of_kind("text", 'a text in quotes such as "0 9 * * MON-FRI"').text[1:-1]

    def time_of_day(self) -> int:
        """A time of day, milliseconds since midnight."""
        token = self.now
        found = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)", self.quoted())
        if found is None:
            raise self.wrong('a time of day such as "20:00"', token)
        return (int(found[1]) * 60 + int(found[2])) * _UNITS_MS["m"]

    def zone(self) -> tzinfo:
        """A time zone."""
        token = self.now
        try:
            return zone_of(self.quoted())
        except ValueError:
            raise self.wrong('a time zone such as "Europe/Berlin"', token) from None

    # -- inside

    def _of_kind(self, kind: str, expected: str) -> Token:
        if self.now.kind != kind:
            raise self.wrong(expected)
        return self.take()

    def _split(self) -> list[Token]:
        tokens, at = [], 0
        text = self._text.rstrip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                what = (
                    "no minus: rates and lengths are never below 0" if text[at] == "-" else "a rate, a name or a sign"
                )
                raise self.wrong(what, Token("sign", text[at], at))
            kind = str(found.lastgroup)
            tokens.append(Token(kind, found[kind], found.start(kind)))
            at = found.end()
        return [*tokens, Token("end", "", len(text))]
