"""The language of rate plans: text in, shape out; what is wrong is said with its place.

::

    plan     = sum { "then" sum }
    sum      = piece { "+" piece }
    piece    = atom [ "for" LENGTH ]
    atom     = RATE | "(" plan ")" | ramp | step | sine | burst | spike | cron | loop
    ramp     = "ramp" "(" RATE ".." RATE "," LENGTH ")"
    step     = "step" "(" RATE ".." RATE, by=RATE, every=LENGTH ")"
    sine     = "sine" "(" mean=RATE, amplitude=RATE, period=LENGTH [, phase=LENGTH | , crest=TEXT [, zone=TEXT]] ")"
    burst    = "burst" "(" RATE "for" LENGTH "every" LENGTH [ "after" LENGTH ] ")"
    spike    = "spike" "(" peak=RATE, rise=LENGTH, fall=LENGTH [, hold=LENGTH] [, after=LENGTH] ")"
    cron     = "cron" "(" TEXT, length=LENGTH, rate=RATE [, zone=TEXT] ")"
    loop     = "loop" "(" plan [, times=NUMBER] ")"
    RATE     = NUMBER [ "/s" | "/min" | "/h" ]
    LENGTH   = 500ms | 10s | 1m30s | 24h | 7d | 1.5h | …
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Any

from ray_pipeline.errors import PlanError
from ray_pipeline.rates import curves
from ray_pipeline.rates.cron import CronWindows
from ray_pipeline.rates.curve import Curve
from ray_pipeline.rates.shapes import NANO, Constant, Cut, Loop, Sequence, Shape, Sum
from ray_pipeline.rates.tokens import LEAST_PERIOD_MS, MOST_RATE, Tokens

__all__ = ["MOST_TEXT", "curve_of", "goes_by_the_calendar", "parse_plan", "tidy"]

MOST_TEXT = 2_000
"""The longest plan, characters."""

_MOST_DEPTH = 20
_MOST_STEPS = 999
_MOST_WINDOW_MS = 31 * 86_400_000
_DAY_MS = 86_400_000

_HOW = {
    "ramp": "ramp(0..500, 10m)",
    "step": "step(100..500, by=100, every=5m)",
    "sine": "sine(mean=300, amplitude=200, period=24h)",
    "burst": "burst(1000 for 5s every 2m)",
    "spike": "spike(peak=1000, rise=10s, hold=20s, fall=30s)",
    "cron": 'cron("0 9 * * MON-FRI", length=8h, rate=500, zone="Europe/Berlin")',
    "loop": "loop(100 for 1m then 300 for 1m)",
}


def tidy(text: str) -> str:
    """A plan's text with single spaces."""
    return " ".join(text.split())


def parse_plan(text: str, zero_ms: int = 0) -> Shape:
    """The shape that a text describes.

    Args:
        text: the plan.
        zero_ms: when it begins, epoch milliseconds UTC; only what goes by the calendar cares.

    Raises:
        PlanError: the text is malformed, or a number is out of range.
    """
    if len(text) > MOST_TEXT:
        raise PlanError(f"the plan has {len(text)} characters, more than {MOST_TEXT}", "Shorten it")
    return _Parser(text, zero_ms).parse()


def curve_of(text: str, zero_ms: int) -> Curve:
    """The curve of a plan that begins at ``zero_ms``; made once for all who ask.

    Raises:
        PlanError: see :func:`parse_plan`.
    """
    return _kept_curve(text, zero_ms if goes_by_the_calendar(text) else 0)


def goes_by_the_calendar(text: str) -> bool:
    """Whether a plan's rates depend on when it begins."""
    return "cron" in text or "crest" in text


@lru_cache(maxsize=64)
def _kept_curve(text: str, zero_ms: int) -> Curve:
    return Curve(parse_plan(text, zero_ms))


class _Parser:
    """By recursive descent. Each rule is told when its shape begins, in milliseconds since the plan's beginning."""

    def __init__(self, text: str, zero_ms: int) -> None:
        self._tokens = Tokens(text)
        self._zero_ms = zero_ms
        self._depth = 0
        self._looping = 0
        self._atoms: dict[str, Callable[[int], Shape]] = {
            "ramp": self._ramp,
            "step": self._step,
            "sine": self._sine,
            "burst": self._burst,
            "spike": self._spike,
            "cron": self._cron,
            "loop": self._loop,
        }

    def parse(self) -> Shape:
        """The whole text."""
        shape = self._plan(0)
        if self._tokens.now.kind != "end":
            raise self._tokens.wrong('"then", "+", "for" or the end')
        if shape.peak > MOST_RATE * NANO:
            what = f"the plan reaches {shape.peak / NANO:,.0f}/s, more than {MOST_RATE:,}/s"
            raise PlanError(what, "Lower its rates")
        return shape

    # -- how shapes are put together

    def _plan(self, at_ms: int) -> Shape:
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise self._tokens.wrong(f"no more than {_MOST_DEPTH} levels of brackets")
        shapes, begins = [self._sum(at_ms)], at_ms
        while self._tokens.now.text == "then":
            length = shapes[-1].length_ms
            if length is None:
                how = "give it a length, such as 500 for 10m or (500 + 20) for 10m"
                raise self._tokens.wrong(f'a piece that ends before "then": {how}')
            self._tokens.take()
            begins += length
            shapes.append(self._sum(begins))
        self._depth -= 1
        return shapes[0] if len(shapes) == 1 else Sequence(shapes)

    def _sum(self, at_ms: int) -> Shape:
        shapes = [self._piece(at_ms)]
        while self._tokens.took("+"):
            shapes.append(self._piece(at_ms))
        return shapes[0] if len(shapes) == 1 else Sum(shapes)

    def _piece(self, at_ms: int) -> Shape:
        shape = self._atom(at_ms)
        return Cut(shape, self._tokens.length()) if self._tokens.took("for") else shape

    def _atom(self, at_ms: int) -> Shape:
        token = self._tokens.now
        if token.kind == "number":
            return Constant(self._tokens.rate())
        if self._tokens.took("("):
            shape = self._plan(at_ms)
            self._tokens.expect(")", "(100 for 1m then 200)")
            return shape
        if token.kind == "name" and token.text in self._atoms:
            self._tokens.take()
            self._tokens.expect("(", _HOW[token.text])
            shape = self._atoms[token.text](at_ms)
            self._tokens.expect(")", _HOW[token.text])
            return shape
        raise self._tokens.wrong(f"a rate such as 500 or 30/min, a bracket, or {', '.join(self._atoms)}")

    # -- the shapes

    def _ramp(self, _: int) -> Shape:
        first, last = self._from_to("ramp")
        self._tokens.expect(",", _HOW["ramp"])
        return curves.ramp(first, last, self._tokens.length())

    def _step(self, _: int) -> Shape:
        first, last = self._from_to("step")
        at = self._tokens.now
        readers = {"by": self._tokens.rate, "every": self._tokens.length}
        given = self._named("step", readers, ("by", "every"), more=True)
        count, rest = divmod(abs(last - first), given["by"]) if given["by"] else (0, 0)
        if rest or not 0 < count <= _MOST_STEPS:
            what = f"by such that whole steps, at most {_MOST_STEPS}, lead from one rate to the other"
            raise self._tokens.wrong(what, at)
        up = given["by"] if last > first else -given["by"]
        return Sequence([Cut(Constant(first + k * up), given["every"]) for k in range(count + 1)])

    def _sine(self, at_ms: int) -> Shape:
        tokens = self._tokens
        at = tokens.now
        readers: dict[str, Callable[[], Any]] = {"mean": tokens.rate, "amplitude": tokens.rate}
        readers |= {"period": tokens.period, "phase": tokens.length}
        readers |= {"crest": tokens.time_of_day, "zone": tokens.zone}
        given = self._named("sine", readers, ("mean", "amplitude", "period"))
        if given["amplitude"] > given["mean"]:
            raise tokens.wrong("an amplitude that is not above the mean: a rate cannot be below 0", at)
        period, phase = given["period"], given.get("phase", 0)
        if "crest" in given or "zone" in given:
            if "phase" in given or "crest" not in given or self._looping:
                raise tokens.wrong("phase, or crest with a zone and outside loop", at)
            phase = period // 4 + self._time_of_day(at_ms, given.get("zone", UTC)) - given["crest"]
        return Loop(curves.sine(given["mean"], given["amplitude"], period, phase % period))

    def _burst(self, _: int) -> Shape:
        rate = self._tokens.rate()
        self._tokens.expect("for", _HOW["burst"])
        length, at = self._tokens.length(), self._tokens.now
        self._tokens.expect("every", _HOW["burst"])
        period = self._tokens.period()
        if length >= period:
            raise self._tokens.wrong("a burst that is shorter than the time from one to the next", at)
        loop = Loop(Sequence([Cut(Constant(rate), length), Cut(Constant(0), period - length)]))
        return self._later(loop, self._tokens.length()) if self._tokens.took("after") else loop

    def _spike(self, _: int) -> Shape:
        lengths = dict.fromkeys(("rise", "hold", "fall", "after"), self._tokens.length)
        given = self._named("spike", {"peak": self._tokens.rate, **lengths}, ("peak", "rise", "fall"))
        table = curves.spike(given["peak"], given["rise"], given.get("hold", 0), given["fall"])
        return self._later(table, given["after"]) if "after" in given else table

    def _cron(self, at_ms: int) -> Shape:
        tokens = self._tokens
        at = tokens.now
        if self._looping:
            raise tokens.wrong("no cron windows inside loop: they go by the calendar, and repeat by themselves", at)
        expression = tokens.quoted()
        readers = {"length": tokens.length, "rate": tokens.rate, "zone": tokens.zone}
        given = self._named("cron", readers, ("length", "rate"), more=True)
        if given["length"] > _MOST_WINDOW_MS:
            raise tokens.wrong("windows of at most 31d", at)
        zone, begin_ms = given.get("zone", UTC), self._zero_ms + at_ms
        try:
            return CronWindows(expression, zone, given["length"], given["rate"], begin_ms)
        except ValueError as error:
            raise tokens.wrong(f"a cron expression such as 0 9 * * MON-FRI ({error})", at) from None

    def _loop(self, at_ms: int) -> Shape:
        at = self._tokens.now
        self._looping += 1
        shape = self._plan(at_ms)
        self._looping -= 1
        given = self._named("loop", {"times": self._tokens.count}, (), more=True)
        if shape.length_ms is None:
            what = "a plan that ends inside loop: give its last piece a length, such as 500 for 10m"
            raise self._tokens.wrong(what, at)
        if shape.length_ms < LEAST_PERIOD_MS:
            raise self._tokens.wrong(f"at least {LEAST_PERIOD_MS}ms in a loop", at)
        return Loop(shape, given.get("times"))

    # -- inside

    def _from_to(self, what: str) -> tuple[int, int]:
        first = self._tokens.rate()
        self._tokens.expect("..", _HOW[what])
        return first, self._tokens.rate()

    def _named(
        self, what: str, readers: dict[str, Callable[[], Any]], needed: tuple[str, ...], more: bool = False
    ) -> dict[str, Any]:
        """Arguments ``name=value`` in any order; ``more``: others came before them."""
        given: dict[str, Any] = {}
        while self._tokens.now.text != ")":
            if given or more:
                self._tokens.expect(",", _HOW[what])
            name = self._tokens.now.text
            if name not in readers or name in given:
                left = ", ".join(f"{n}=" for n in readers if n not in given)
                raise self._tokens.wrong(f"{left or 'a closing bracket'}; write {_HOW[what]}")
            self._tokens.take()
            self._tokens.expect("=", _HOW[what])
            given[name] = readers[name]()
        missing = [name for name in needed if name not in given]
        if missing:
            raise self._tokens.wrong(f"{missing[0]}=; write {_HOW[what]}")
        return given

    def _later(self, shape: Shape, after_ms: int) -> Shape:
        return Sequence([Cut(Constant(0), after_ms), shape])

    def _time_of_day(self, at_ms: int, zone: tzinfo) -> int:
        """When a shape begins, milliseconds since midnight, by the zone's difference to UTC at that moment."""
        begin_ms = self._zero_ms + at_ms
        offset = datetime.fromtimestamp(begin_ms / 1000, zone).utcoffset() or timedelta(0)
        return (begin_ms + round(offset.total_seconds() * 1000)) % _DAY_MS
