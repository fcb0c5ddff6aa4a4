"""What is done to the pipeline, and in which order: a pure function of the seed."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["KINDS", "OF_OWN", "Fault", "Kind", "parse_kinds", "plan"]


class Kind(enum.StrEnum):
    """A kind of fault."""

    KILL_GENERATOR = "kill-generator"
    STOP_GENERATOR = "stop-generator"
    KILL_IN_COMMIT = "kill-in-commit"
    KILL_BROKER = "kill-broker"
    STOP_BROKER = "stop-broker"
    KILL_EXECUTOR = "kill-executor"
    KILL_DRIVER = "kill-driver"
    KILL_MASTER = "kill-master"
    KILL_SERVING = "kill-serving"
    KILL_ORACLE = "kill-oracle"
    KILL_RUN = "kill-run"
    KILL_RAY = "kill-ray"
    RESCALE = "rescale"
    RATE = "rate"
    PAUSE = "pause"


KINDS = tuple(Kind)
OF_OWN = (Kind.KILL_RUN, Kind.KILL_RAY)
"""Those for who started the pipeline alone: it must be started again."""

_TIMES = {
    Kind.RATE: 20,
    Kind.PAUSE: 16,
    Kind.KILL_GENERATOR: 12,
    Kind.KILL_IN_COMMIT: 12,
    Kind.RESCALE: 8,
    Kind.KILL_SERVING: 3,
    Kind.KILL_BROKER: 3,
    Kind.KILL_EXECUTOR: 2,
    Kind.KILL_ORACLE: 2,
    Kind.STOP_GENERATOR: 1,
    Kind.STOP_BROKER: 1,
    Kind.KILL_DRIVER: 1,
    Kind.KILL_MASTER: 1,
    Kind.KILL_RUN: 1,
    Kind.KILL_RAY: 1,
}
"""How often a kind comes in a round: those that heal within seconds often, those that take half a minute once."""

STOPPED_S = 20.0
"""How long a generator actor stands still: twice the transaction timeout, so that its transactions are aborted meanwhile."""
BROKER_STOPPED_S = 12.0
"""How long the broker stands still: longer than the transaction timeout of 10 s."""
_OVERLAPPING = 0.2
_BETWEEN_S = (0.0, 1.5)
# as shares of the commit interval, counted from when the next commit is due
_AIMS = {"before": (-0.6, -0.1), "inside": (0.0, 0.15), "after": (0.2, 0.6)}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        number: its place in the plan, from 0.
        kind: what is done.
        after_s: how long after the pipeline has recovered from the fault before, seconds; of an overlapping one, how long after
            the fault before has begun.
        overlapping: whether it does not wait for the recovery from the fault before.
        parameters: what the kind needs to know, see :func:`plan`.
    """

    number: int
    kind: Kind
    after_s: float
    overlapping: bool = False
    parameters: Mapping[str, float | int | str] = field(default_factory=dict)


def parse_kinds(text: str | None) -> tuple[Kind, ...]:
    """``kill-broker,rate`` → kinds; None = all.

    Raises:
        ValueError: a kind is unknown, or none is named.
    """
    if text is None:
        return KINDS
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in set(KINDS)]
    if unknown or not names:
        msg = f"unknown fault {unknown[0]!r}" if unknown else "no fault is named"
        raise ValueError(msg)
    return tuple(kind for kind in KINDS if kind in names)


def plan(seed: int, count: int, kinds: Iterable[Kind] = KINDS, *, evenly: bool = False) -> list[Fault]:
    """The first ``count`` faults of a seed; a longer plan begins with the shorter one.

    They come in rounds: a round has every kind, as often as it can heal in a fair share of the time (``evenly``: once), in a drawn
    order. Parameters by kind: ``pick`` (0 … 1, which of several processes), ``seconds`` (how long it lasts), ``aim`` and ``offset``
    (where in a commit, shares of the interval), ``factor`` (of the rate at the start), ``actors``.
    """
    draw = random.Random(f"ray-pipeline chaos {seed}")
    deck = [kind for kind in sorted(set(kinds)) for _ in range(1 if evenly else _TIMES[kind])]
    faults: list[Fault] = []
    while len(faults) < count:
        draw.shuffle(deck)
        for kind in deck:
            faults.append(_fault(len(faults), kind, draw))
    return faults[:count]


def _fault(number: int, kind: Kind, draw: random.Random) -> Fault:
    after_s = round(draw.uniform(*_BETWEEN_S), 3)
    overlapping = draw.random() < _OVERLAPPING and number > 0
    return Fault(number, kind, after_s, overlapping, _parameters(kind, draw))


def _parameters(kind: Kind, draw: random.Random) -> dict[str, float | int | str]:
    pick = round(draw.random(), 6)
    if kind is Kind.STOP_GENERATOR:
        return {"pick": pick, "seconds": STOPPED_S}
    if kind is Kind.STOP_BROKER:
        return {"seconds": BROKER_STOPPED_S}
    if kind is Kind.KILL_IN_COMMIT:
        aim = draw.choice(sorted(_AIMS))
        return {"pick": pick, "aim": aim, "offset": round(draw.uniform(*_AIMS[aim]), 3)}
    if kind is Kind.RATE:
        return {"factor": draw.choice((0.5, 0.75, 1.5, 2.0))}
    if kind is Kind.PAUSE:
        return {"seconds": round(draw.uniform(0.5, 3.0), 3)}
    if kind is Kind.RESCALE:
        return {"actors": draw.randint(1, 3)}
    return {"pick": pick}
