"""Texts of settings that say what befalls the time of single shards: a clock that is wrong, a partition that falls silent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["Silence", "parse_clock_skew", "parse_silent"]

_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
_SPAN = re.compile(r"([+-]?\d+(?:\.\d+)?)(ms|s|m|h)")
_MOST_MS = 366 * 86_400_000


@dataclass(frozen=True, slots=True)
class Silence:
    """A partition that sends nothing, again and again, and what it held back afterwards.

    Attributes:
        every_ms: distance between the beginnings, milliseconds of event time since 1970-01-01 UTC.
        for_ms: length of each, below ``every_ms``.
    """

    every_ms: int
    for_ms: int


def parse_clock_skew(text: str) -> dict[int, int]:
    """``PARTITION:SPAN`` with commas between, such as ``1:-30s,2:500ms`` → milliseconds by partition.

    Raises:
        ValueError: it is written otherwise; the text names the part and an example.
    """
    found: dict[int, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        partition, _, span = part.partition(":")
        _add(found, partition, _span(span, part, "1:-30s"), part, "1:-30s")
    return found


def parse_silent(text: str) -> dict[int, Silence]:
    """``PARTITION:every=SPAN,for=SPAN`` with semicolons between, such as ``2:every=600s,for=120s`` → silences by partition.

    Raises:
        ValueError: it is written otherwise; the text names the part and an example.
    """
    example = "2:every=600s,for=120s"
    found: dict[int, Silence] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        partition, _, rest = part.partition(":")
        spans = dict(pair.strip().partition("=")[::2] for pair in rest.split(","))
        if set(spans) != {"every", "for"}:
            raise ValueError(_unlike(part, example))
        silence = Silence(_span(spans["every"], part, example), _span(spans["for"], part, example))
        if not 0 < silence.for_ms < silence.every_ms:
            msg = f"{part!r}: for must be above 0 and below every, as in {example}"
            raise ValueError(msg)
        _add(found, partition, silence, part, example)
    return found


def _add(found: dict[int, Any], partition: str, value: Any, part: str, example: str) -> None:
    if not partition.strip().isdigit():
        raise ValueError(_unlike(part, example))
    if int(partition) in found:
        msg = f"partition {int(partition)} is named twice"
        raise ValueError(msg)
    found[int(partition)] = value


def _span(text: str, part: str, example: str) -> int:
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise ValueError(_unlike(part, example))
    span_ms = round(float(match[1]) * _UNITS_MS[match[2]])
    if abs(span_ms) > _MOST_MS:
        msg = f"{part!r} is more than a year"
        raise ValueError(msg)
    return span_ms


def _unlike(part: str, example: str) -> str:
    return f"{part!r} is not written like {example} (units: ms, s, m, h)"
