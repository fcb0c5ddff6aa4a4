"""Whether a window holds what it must, and if not, what is wrong with it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Judgement", "Verdict", "compare", "diagnose", "judge"]

_GRACE_MS = 5_000
"""How long after a window is final a record of it, or a rating of it that was not read, may still be on its way."""


class Verdict(enum.Enum):
    """What is known of a window."""

    VERIFIED = "verified"
    PENDING = "pending"
    LATE = "late by design"
    WRONG = "WRONG"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict with its reason.

    Attributes:
        verdict: what is known.
        reason: one line; empty when verified.
        difference: actual count less the expected one; None of an open window while the two are not of the same micro-batch.
    """

    verdict: Verdict
    reason: str
    difference: int | None


def judge(expected: Mapping[str, Any], actual: Mapping[str, Mapping[str, Any]], now_ms: int) -> Judgement:
    """Judge one window.

    Args:
        expected: its record of topic ``metrics.expected``.
        actual: its records of topic ``metrics``, by kind: ``total``, ``topn``, ``genres``; those that are there.
        now_ms: wall clock, epoch milliseconds.
    """
    total = actual.get("total")
    difference = (int(total["count"]) if total else 0) - int(expected["count"])
    wrong = compare(expected, actual)
    late, unread, final = int(expected["late"]), int(expected["unread"]), bool(expected["final"])
    if final and now_ms - int(expected["final_ms"]) > _GRACE_MS:
        if wrong:
            return Judgement(Verdict.WRONG, wrong, difference)
        if unread:
            return Judgement(Verdict.WRONG, _unread(expected), difference - unread)
    elif wrong and _same_batch(expected, actual) and now_ms - int(expected["updated_ms"]) > _GRACE_MS:
        return Judgement(Verdict.WRONG, wrong, difference)
    if not final:
        same = difference if not wrong or _same_batch(expected, actual) else None
        return Judgement(Verdict.PENDING, "still open" + ("" if wrong else ", agrees so far"), same)
    if wrong or unread:
        return Judgement(Verdict.PENDING, "just final", difference)
    if late:
        return Judgement(Verdict.LATE, f"{late:,} ratings came too late and were left out, as they must be", 0)
    return Judgement(Verdict.VERIFIED, "", 0)


def compare(expected: Mapping[str, Any], actual: Mapping[str, Mapping[str, Any]]) -> str:
    """The first difference between a window and what it must hold, in words; empty when there is none."""
    total, topn, genres = (actual.get(kind) for kind in ("total", "topn", "genres"))
    for kind, record in (("total", total), ("topn", topn), ("genres", genres)):
        if record is None:
            return f"there is no {kind} record, {expected['count']:,} ratings are expected"
    assert total is not None and topn is not None and genres is not None
    found, wanted = int(total["count"]), int(expected["count"])
    if found != wanted:
        return f"holds {found:,} ratings, {wanted:,} are expected: {abs(found - wanted):,} too {'many' if found > wanted else 'few'}"
    for name, what in (
        ("window_end", "the end"),
        ("histogram", "the histogram"),
        ("avg_rating", "the mean"),
        ("p50", "the median"),
        ("p95", "the 95th percentile"),
    ):
        if total[name] != expected[name]:
            return f"{what} is {total[name]}, {expected[name]} is expected"
    return (
        _rows("movie", "movieId", topn["movies"], expected["movies"])
        or _rows("genre", "genre", genres["genres"], expected["genres"])
        or _heads(expected, actual)
    )


def diagnose(
    expected: Mapping[str, Any],
    actual: Mapping[str, Mapping[str, Any]],
    expected_at: Callable[[str, int], Mapping[str, Any] | None],
    size_ms: int,
    start_ms: int,
    types: Mapping[str, int],
) -> str:
    """What a wrong window looks like: a known way to get windows wrong that fits its numbers; empty when none does.

    Args:
        expected: its record of topic ``metrics.expected``.
        actual: its records of topic ``metrics``, by kind.
        expected_at: gives the expected record of any window, by type and start in epoch milliseconds.
        size_ms: the window's length, milliseconds.
        start_ms: its start, epoch milliseconds.
        types: length in milliseconds of every window type.
    """
    total = actual.get("total")
    if total is None or not total["count"]:
        return "the window was never written, or another one took its key"
    count, histogram = int(total["count"]), list(total["histogram"])
    if count == expected["count"]:
        if sum(histogram[0::2]) == 0 and sum(expected["histogram"][0::2]):
            return "it holds whole stars only: ratings were read as whole numbers"
        if histogram == expected["histogram"]:
            return "the totals are right: the order or the counts within the window are not"
        return ""
    for name, size in types.items():
        other = expected_at(name, start_ms) if name != expected["window_type"] else None
        if other is not None and histogram == other["histogram"]:
            return f"it holds what {name} must hold"
        if name != expected["window_type"] and size < size_ms and size_ms % size == 0:
            parts = [expected_at(name, start_ms + n * size) for n in range(size_ms // size)]
            short = _part_of(count, [int(p["count"]) if p else 0 for p in parts])
            if short:
                return f"it spans {short * size / 1000:g} s instead of {size_ms / 1000:g} s"
    for partition, n in expected["partitions"].items():
        if n and count == int(expected["count"]) - n:
            return f"partition {partition} is not in it"
    short, late = int(expected["count"]) - count, int(expected["late"])
    if short > 0:
        return (
            f"{short + late:,} ratings of it were dropped, and only {late:,} of them came too late"
            if late
            else f"{short:,} ratings were dropped that were not too late"
        )
    return "records are in it that the shards did not send, or some were counted twice"


def _part_of(count: int, parts: Sequence[int]) -> int:
    """How many parts at the beginning, or at the end, make up the count; 0 = no such number."""
    for n in range(1, len(parts)):
        if count and count in (sum(parts[:n]), sum(parts[-n:])):
            return n
    return 0


def _same_batch(expected: Mapping[str, Any], actual: Mapping[str, Mapping[str, Any]]) -> bool:
    total = actual.get("total")
    return total is not None and int(total["batch"]) == int(expected["batch"])


def _rows(what: str, name: str, found: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> str:
    for place, (has, must) in enumerate(zip(found, wanted, strict=False), 1):
        if any(has[field] != must[field] for field in (name, "count", "avg_rating")):
            return (
                f"{what} {place} is {has[name]} with {has['count']:,} ratings of mean {has['avg_rating']}, expected is "
                f"{must[name]} with {must['count']:,} of mean {must['avg_rating']}"
            )
    if len(found) != len(wanted):
        return f"{len(found)} {what} rows are there, {len(wanted)} are expected"
    return ""


def _heads(expected: Mapping[str, Any], actual: Mapping[str, Mapping[str, Any]]) -> str:
    """What all records of a window begin with."""
    for kind, record in sorted(actual.items()):
        for name in ("window_type", "window_start", "window_end", "count", "avg_rating"):
            if record.get(name) != expected[name]:
                return f"{name} of its {kind} record is {record.get(name)}, {expected[name]} is expected"
    return ""


def _unread(expected: Mapping[str, Any]) -> str:
    where = ", ".join(f"{n:,} of partition {p}" for p, n in expected["unread_partitions"].items())
    return f"is final, but {where} that belong to it have not been read"
