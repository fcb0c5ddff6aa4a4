"""Every window beside what it must hold. Bounded: of windows that are settled only a digest is kept."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_pipeline.metrics.records import KINDS, WindowId, window_of
from ray_pipeline.truth.verdict import Judgement, Verdict, diagnose, judge
from ray_pipeline.windows.spec import epoch_ms, iso_ms

__all__ = ["Tally", "Verdicts", "difference_text"]

_DETAILS_KEPT = 200
_WINDOWS_KEPT = 20_000
_UNCLAIMED_MS = 5_000
"""So long after the oracle has reached a micro-batch, its word on a window of that one may still be on its way."""
_OVERDUE_MS = 10_000
"""So long after the job has closed a window there is a verdict on it, or it is said that there is none."""
_FIELDS = {
    "total": ("window_end", "count", "avg_rating", "p50", "p95", "histogram"),
    "topn": ("movies",),
    "genres": ("genres",),
}
_SUMMARY_FIELDS = ("count", "avg_rating", "outside", "late", "unread", "batch", "final")
_ALTERED = "was altered after it had been verified"
_DELETED = "was deleted after it had been verified"


@dataclass(frozen=True, slots=True)
class Tally:
    """How many windows have which verdict.

    Attributes:
        verified: agree and are final.
        pending: still open, or not compared yet.
        late: agree, and ratings came too late for them, as many as must be.
        wrong: differ.
        first_wrong: the first one that differs, with what is wrong; empty when none does.
        overdue: pending ones that the job has closed more than ten seconds ago.
        first_overdue: the first of these, in words; empty when there are none.
    """

    verified: int
    pending: int
    late: int
    wrong: int
    first_wrong: str
    overdue: int = 0
    first_overdue: str = ""


@dataclass
class _Pair:
    """A window: what it must hold, what it holds by kind of record, and why some of it cannot be read.

    Once the details are forgotten, ``digests`` stand for what it was verified with, and ``actual`` has only what came since.
    """

    expected: dict[str, Any] | None = None
    actual: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    settled: Judgement | None = None
    digests: dict[str, bytes] = field(default_factory=dict)
    verified: Judgement | None = None
    altered: bool = False


class _Before:
    """A number that grows, and what it was some time ago; one that falls begins anew.

    Args:
        ago_ms: how long ago, milliseconds.
    """

    def __init__(self, ago_ms: int) -> None:
        self._ago_ms = ago_ms
        self._said: deque[tuple[int, int]] = deque()  # what was said in one millisecond is one

    def say(self, number: int, now_ms: int) -> None:
        said = self._said
        if said and number < said[-1][1]:
            said.clear()
        if said and number == said[-1][1]:
            return
        if said and said[-1][0] == now_ms:
            said.pop()
        said.append((now_ms, number))
        while len(said) > 1 and said[1][0] <= now_ms - self._ago_ms:
            said.popleft()

    def at(self, now_ms: int) -> int | None:
        """None = it had not been said yet."""
        return next((number for at_ms, number in reversed(self._said) if at_ms <= now_ms - self._ago_ms), None)


class Verdicts:
    """Takes expected and actual windows in, in any order; a record that comes twice changes nothing.

    A window is known by its type and start. Older ones than the newest 20,000 are forgotten; that one of them was wrong is not.
    """

    def __init__(self) -> None:
        self._pairs: dict[WindowId, _Pair] = {}
        self._in_time: list[tuple[int, str]] = []  # start and type of each of them, ascending
        self._forgotten_ms = -math.inf  # start of the newest window that was forgotten
        self._unsettled: set[WindowId] = set()
        self._types: dict[str, int] = {}
        self._whole: dict[str, set[int]] = {}
        self._counts = {Verdict.VERIFIED: 0, Verdict.LATE: 0, Verdict.WRONG: 0}  # of settled ones, forgotten ones too
        self._wrong: dict[WindowId, Judgement] = {}  # settled ones
        self._forgotten: dict[WindowId, Judgement] = {}  # the first wrong one that was
        self._job_batch = -1
        self._closed_ms = _Before(_OVERDUE_MS)
        self._oracle_batch = _Before(_UNCLAIMED_MS)
        self._oracle_ms = 0
        self._looked_ms = 0

    def expect(self, record: dict[str, Any]) -> None:
        """A window's record of topic ``metrics.expected``."""
        record.setdefault("outside", 0)  # one that an earlier version wrote
        key = self._key(record)
        pair = self._pair(key)
        if pair is None:
            return
        pair.unreadable.pop("", None)
        if pair.digests:
            if all(_digest(kind, record) == digest for kind, digest in pair.digests.items()):
                self._reopen(key, pair)
                return  # an oracle that began again says the same of a window whose details are forgotten
            pair.digests, pair.altered = {}, False
        pair.expected = record
        self._types.setdefault(key[0], epoch_ms(record["window_end"]) - key[1])
        self._reopen(key, pair)

    def actual(self, record: dict[str, Any]) -> None:
        """A record of topic ``metrics``."""
        key = self._key(record)
        pair = self._pair(key)
        if pair is None:
            return
        pair.actual[record["kind"]] = record
        pair.unreadable.pop(record["kind"], None)
        self._compare_digests(pair)
        self._reopen(key, pair)

    def no_actual(self, key: str, reason: str = "") -> None:
        """Under a key of topic ``metrics`` is no record of a window: it was deleted, or, with a reason, is another thing."""
        window, kind = window_of(key)
        if not kind:
            window, kind = (key, 0), "record"
        pair = self._pair(window)
        if pair is None:
            return
        pair.actual.pop(kind, None)
        pair.unreadable.pop(kind, None)
        if reason or pair.digests:
            pair.unreadable[kind] = reason or _DELETED
        self._compare_digests(pair)
        self._reopen(window, pair)

    def no_expected(self, key: str, reason: str = "") -> None:
        """The same of a key of topic ``metrics.expected``: what the window must hold is not known."""
        window, kind = window_of(key)
        if kind:
            window = (key, 0)
        pair = self._pair(window)
        if pair is None:
            return
        pair.unreadable.pop("", None)
        if reason or pair.digests:
            pair.unreadable[""] = reason or _DELETED
        else:
            pair.expected = None
        self._reopen(window, pair)

    def job_at(self, batch: int, watermark_ms: int | None, now_ms: int) -> None:
        """How far the job is.

        Args:
            batch: its newest micro-batch.
            watermark_ms: windows that end here or before are closed, event time in epoch milliseconds; None before there is one.
            now_ms: when that became known, wall clock, epoch milliseconds.
        """
        if batch < self._job_batch:  # its query began anew, and so will the oracle
            self._oracle_batch = _Before(_UNCLAIMED_MS)
        self._job_batch = batch
        self._closed_ms.say(-1 if watermark_ms is None else watermark_ms, now_ms)

    def oracle_at(self, batch: int, now_ms: int) -> None:
        """How far the oracle is: up to which micro-batch; ``now_ms`` as in :meth:`job_at`."""
        self._oracle_batch.say(batch, now_ms)
        self._oracle_ms = now_ms

    def of(self, window_type: str, start_ms: int, now_ms: int) -> dict[str, Any]:
        """``verdict``, ``reason``, ``difference``, ``expected`` and ``actual`` of one window.

        The last two have ``count`` and ``avg_rating``, and are None where that is not known or not there.
        """
        key = window_type, start_ms
        pair = self._pairs.get(key)
        found = Judgement(Verdict.PENDING, "not computed yet", None) if pair is None else self._judge(key, pair, now_ms)
        return _row(pair, found)

    def tally(self, now_ms: int) -> Tally:
        """All windows together."""
        self._looked_ms = now_ms
        still_open = self._open(now_ms)
        wrong = self._in_order(still_open)
        open_wrong = sum(1 for found in still_open.values() if found.verdict is Verdict.WRONG)
        overdue = self._overdue(still_open, now_ms)
        named = f"{_name(wrong[0][0])} {wrong[0][1].reason}" if wrong else ""
        waits = (
            f"{_name(overdue[0])} was closed more than {_OVERDUE_MS // 1000} s ago and is not verified"
            if overdue
            else ""
        )
        return Tally(
            self._counts[Verdict.VERIFIED],
            len(still_open) - open_wrong,
            self._counts[Verdict.LATE],
            self._counts[Verdict.WRONG] + open_wrong,
            named,
            len(overdue),
            waits,
        )

    def wrong(self, now_ms: int, most: int = 20) -> list[dict[str, Any]]:
        """The first wrong windows: type, start, and what :meth:`of` says of them."""
        return [
            {"window_type": name, "window_start": iso_ms(start), **_row(self._pairs.get((name, start)), found)}
            for (name, start), found in self._in_order(self._open(now_ms))[:most]
        ]

    # -- inside

    def _open(self, now_ms: int) -> dict[WindowId, Judgement]:
        """The windows that are not settled even now, by window."""
        judged = {key: self._judge(key, self._pairs[key], now_ms) for key in sorted(self._unsettled)}
        return {key: found for key, found in judged.items() if key in self._unsettled}

    def _in_order(self, still_open: Mapping[WindowId, Judgement]) -> list[tuple[WindowId, Judgement]]:
        """Wrong windows, in order of their starts."""
        open_wrong = {key: found for key, found in still_open.items() if found.verdict is Verdict.WRONG}
        return sorted({**self._forgotten, **self._wrong, **open_wrong}.items(), key=lambda row: row[0][::-1])

    def _overdue(self, still_open: Mapping[WindowId, Judgement], now_ms: int) -> list[WindowId]:
        """Windows that had been closed some time ago and are pending all the same, in order of their starts."""
        closed_ms = self._closed_ms.at(now_ms)
        if closed_ms is None:
            return []
        pending = [key for key, found in still_open.items() if found.verdict is Verdict.PENDING]
        return sorted((key for key in pending if _end_ms(self._pairs[key]) <= closed_ms), key=lambda key: key[::-1])

    @staticmethod
    def _key(record: Mapping[str, Any]) -> WindowId:
        return record["window_type"], epoch_ms(record["window_start"])

    def _pair(self, key: WindowId) -> _Pair | None:
        """A window, made when it is new; None when it is older than all that are kept."""
        pair = self._pairs.get(key)
        if pair is not None:
            return pair
        window_type, start_ms = key
        if start_ms <= self._forgotten_ms:
            return None
        if len(self._pairs) >= _WINDOWS_KEPT:
            oldest_ms, of_type = self._in_time[0]
            if start_ms <= oldest_ms:
                return None
            self._forget((of_type, oldest_ms))
        insort(self._in_time, (start_ms, window_type))
        pair = self._pairs[key] = _Pair()
        return pair

    def _drop(self, key: WindowId) -> None:
        del self._pairs[key]
        del self._in_time[bisect_left(self._in_time, key[::-1])]
        self._unsettled.discard(key)

    def _forget(self, key: WindowId) -> None:
        pair = self._pairs[key]
        found = self._judge(key, pair, self._looked_ms)
        if found.verdict is Verdict.WRONG:
            self._counts[Verdict.WRONG] += pair.settled is None
            if not self._forgotten:
                self._forgotten[key] = found
        self._drop(key)
        self._wrong.pop(key, None)
        self._forgotten_ms = max(self._forgotten_ms, key[1])

    def _reopen(self, key: WindowId, pair: _Pair) -> None:
        """Something was said of a window: judge it anew, at once where it agrees; what does not may still be on its way."""
        self._unsettle(key, pair)
        if pair.unreadable or pair.altered:
            return
        if pair.digests:
            assert pair.verified is not None
            self._note(key, pair, pair.verified)
        elif pair.expected is None and not pair.actual:
            self._drop(key)  # all that was said of it has been taken back
        elif pair.expected is not None and pair.expected["final"] and len(pair.actual) == len(KINDS):
            self._judge(key, pair, 0)

    def _unsettle(self, key: WindowId, pair: _Pair) -> None:
        if pair.settled is not None:
            self._counts[pair.settled.verdict] -= 1
            self._wrong.pop(key, None)
        pair.settled = None
        self._unsettled.add(key)

    def _note(self, key: WindowId, pair: _Pair, found: Judgement) -> None:
        pair.settled = found
        self._counts[found.verdict] += 1
        self._unsettled.discard(key)
        if found.verdict is Verdict.WRONG:
            self._wrong[key] = found

    def _judge(self, key: WindowId, pair: _Pair, now_ms: int) -> Judgement:
        if pair.settled is not None:
            return pair.settled
        if pair.unreadable or pair.altered:
            return Judgement(Verdict.WRONG, _what_is_wrong(pair), None)
        if pair.expected is None:
            return self._unclaimed(pair)
        found = judge(pair.expected, pair.actual, now_ms)
        if found.verdict is Verdict.WRONG:
            cause = diagnose(pair.expected, pair.actual, self._expected_at, self._types[key[0]], key[1], self._types)
            found = Judgement(found.verdict, f"{found.reason} ({cause})" if cause else found.reason, found.difference)
        if found.verdict is not Verdict.PENDING and pair.expected["final"]:
            self._note(key, pair, found)
            if found.verdict is not Verdict.WRONG:
                self._slim(*key)
        return found

    def _unclaimed(self, pair: _Pair) -> Judgement:
        """Of a window that only the job has: the oracle may not be there yet, or no rating belongs to it."""
        reached = self._oracle_batch.at(
            self._oracle_ms
        )  # and it has gone on since: one that died may not have said all
        batch = max(int(record.get("batch", -1)) for record in pair.actual.values())
        # windows are published before the job says so: one micro-batch ahead it may be, and no more
        claimed = self._job_batch if 0 <= self._job_batch < batch - 1 else batch
        if reached is not None and claimed <= reached:
            return Judgement(Verdict.WRONG, "is there, but no rating belongs to it", None)
        return Judgement(Verdict.PENDING, "not computed yet", None)

    def _slim(self, window_type: str, start_ms: int) -> None:
        """Forget the details of all but the newest settled windows of a type."""
        whole = self._whole.setdefault(window_type, set())
        whole.add(start_ms)
        while len(whole) > _DETAILS_KEPT:
            oldest = min(whole)
            whole.discard(oldest)
            pair = self._pairs.get((window_type, oldest))
            if pair is None or pair.settled is None or pair.expected is None or pair.digests:
                continue
            if pair.settled.verdict is Verdict.WRONG:
                continue
            pair.digests, pair.verified = {kind: _digest(kind, pair.expected) for kind in KINDS}, pair.settled
            pair.expected = {name: pair.expected[name] for name in (*_SUMMARY_FIELDS, "histogram", "window_end")}
            pair.actual = {}

    def _compare_digests(self, pair: _Pair) -> None:
        """Compare what came of a window whose details are forgotten with what it was verified with."""
        if not pair.digests:
            return
        pair.altered = any(_digest(kind, record) != pair.digests[kind] for kind, record in pair.actual.items())
        if not pair.altered and len(pair.actual) == len(KINDS):
            pair.actual = {}

    def _expected_at(self, window_type: str, start_ms: int) -> Mapping[str, Any] | None:
        pair = self._pairs.get((window_type, start_ms))
        return pair.expected if pair else None


def difference_text(difference: int | None) -> str:
    """Actual count less the expected one, with its sign; a dash where nothing can be said yet."""
    if difference is None:
        return "–"
    return f"{difference:+,}" if difference else "0"


def _name(window: WindowId) -> str:
    return f"window {window[0][:100]} from {iso_ms(window[1])}"


def _row(pair: _Pair | None, found: Judgement) -> dict[str, Any]:
    expected = pair.expected if pair else None
    actual = _total(pair) if pair else None
    return {
        "verdict": found.verdict.value,
        "reason": found.reason,
        "difference": found.difference,
        "expected": {name: expected[name] for name in _SUMMARY_FIELDS} if expected else None,
        "actual": {name: actual[name] for name in ("count", "avg_rating")} if actual else None,
    }


def _total(pair: _Pair) -> dict[str, Any] | None:
    """What a window's ``total`` record says, as far as it is compared; None where there is none that can be read."""
    if "total" in pair.unreadable:
        return None
    return pair.actual.get("total") or (pair.expected if pair.digests else None)


def _what_is_wrong(pair: _Pair) -> str:
    if pair.altered:
        return _ALTERED
    kind, reason = next(iter(pair.unreadable.items()))
    return f"cannot be compared: what it must hold {reason}" if not kind else f"cannot be compared: its {kind} {reason}"


def _end_ms(pair: _Pair) -> int:
    known = [pair.expected] if pair.expected else list(pair.actual.values())
    return epoch_ms(known[0]["window_end"])


def _digest(kind: str, record: Mapping[str, Any]) -> bytes:
    content = [record[name] for name in _FIELDS[kind]]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()
