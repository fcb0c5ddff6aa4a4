"""Every window beside what it must hold. Bounded: of windows that are settled only a digest is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_pipeline.truth.verdict import Judgement, Verdict, diagnose, judge
from ray_pipeline.windows.spec import epoch_ms, iso_ms

__all__ = ["Tally", "Verdicts", "difference_text"]

_DETAILS_KEPT = 200
_WINDOWS_KEPT = 20_000
_TOTAL_FIELDS = ("window_end", "count", "avg_rating", "p50", "p95", "histogram")
_SUMMARY_FIELDS = ("count", "avg_rating", "outside", "late", "unread", "batch", "final")


@dataclass(frozen=True, slots=True)
class Tally:
    """How many windows have which verdict.

    Attributes:
        verified: agree and are final.
        pending: still open, or not compared yet.
        late: agree, and ratings came too late for them, as many as must be.
        wrong: differ.
        first_wrong: the first one that differs, with what is wrong; empty when none does.
    """

    verified: int
    pending: int
    late: int
    wrong: int
    first_wrong: str


@dataclass
class _Pair:
    expected: dict[str, Any] | None = None
    actual: dict[str, dict[str, Any]] = field(default_factory=dict)
    settled: Judgement | None = None
    digest: str = ""


class Verdicts:
    """Takes expected and actual windows in, in any order; a record that comes twice changes nothing."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, int], _Pair] = {}
        self._unsettled: set[tuple[str, int]] = set()
        self._types: dict[str, int] = {}
        self._whole: dict[str, set[int]] = {}
        self._counts = {Verdict.VERIFIED: 0, Verdict.LATE: 0, Verdict.WRONG: 0}  # of settled ones, forgotten ones too
        self._wrong: dict[tuple[str, int], Judgement] = {}  # settled ones

    def expect(self, record: dict[str, Any]) -> None:
        """A window's record of topic ``metrics.expected``."""
        record.setdefault("outside", 0)  # one that an earlier version wrote
        key = self._key(record)
        pair = self._pair(key)
        if pair.digest and pair.expected is not None and "movies" not in pair.expected:
            if _digest(record, record, record) == pair.digest:
                return  # an oracle that began again says the same of a window whose details are forgotten
            pair.digest = ""
        pair.expected = record
        self._types.setdefault(key[0], epoch_ms(record["window_end"]) - key[1])
        self._reopen(key, pair)

    def actual(self, record: dict[str, Any]) -> None:
        """A record of topic ``metrics``."""
        key = self._key(record)
        pair = self._pair(key)
        pair.actual[record["kind"]] = record
        if pair.settled is None or pair.expected is None or "movies" in pair.expected:
            self._reopen(key, pair)
        elif len(pair.actual) == 3:  # what it must hold has been forgotten, but not its digest
            if _digest(pair.actual["total"], pair.actual["topn"], pair.actual["genres"]) != pair.digest:
                self._unsettle(key, pair)
                self._note(key, pair, Judgement(Verdict.WRONG, "was altered after it had been verified", 0))
            pair.actual = {}

    def of(self, window_type: str, start_ms: int, now_ms: int) -> dict[str, Any]:
        """``verdict``, ``reason``, ``difference`` and ``expected`` of one window."""
        pair = self._pairs.get((window_type, start_ms))
        if pair is None or pair.expected is None:
            return {
                "verdict": Verdict.PENDING.value,
                "reason": "not computed yet",
                "difference": None,
                "expected": None,
            }
        found = self._judge((window_type, start_ms), pair, now_ms)
        return {
            "verdict": found.verdict.value,
            "reason": found.reason,
            "difference": found.difference,
            "expected": {name: pair.expected[name] for name in _SUMMARY_FIELDS},
        }

    def tally(self, now_ms: int) -> Tally:
        """All windows together."""
        wrong = self._all_wrong(now_ms)
        open_wrong = len(wrong) - len(self._wrong)
        named = ""
        if wrong:
            (name, start_ms), found = wrong[0]
            named = f"window {name} from {iso_ms(start_ms)} {found.reason}"
        return Tally(
            self._counts[Verdict.VERIFIED],
            len(self._unsettled) - open_wrong,
            self._counts[Verdict.LATE],
            self._counts[Verdict.WRONG] + open_wrong,
            named,
        )

    def wrong(self, now_ms: int, most: int = 20) -> list[dict[str, Any]]:
        """The first wrong windows: type, start, reason, difference."""
        return [
            {
                "window_type": name,
                "window_start": iso_ms(start),
                "reason": found.reason,
                "difference": found.difference,
            }
            for (name, start), found in self._all_wrong(now_ms)[:most]
        ]

    # -- inside

    def _all_wrong(self, now_ms: int) -> list[tuple[tuple[str, int], Judgement]]:
        """Wrong windows, in order of their starts."""
        judged = [(key, self._judge(key, self._pairs[key], now_ms)) for key in sorted(self._unsettled)]
        still_open = [(k, found) for k, found in judged if k in self._unsettled and found.verdict is Verdict.WRONG]
        return sorted([*self._wrong.items(), *still_open], key=lambda row: row[0][::-1])

    @staticmethod
    def _key(record: Mapping[str, Any]) -> tuple[str, int]:
        return record["window_type"], epoch_ms(record["window_start"])

    def _pair(self, key: tuple[str, int]) -> _Pair:
        pair = self._pairs.get(key)
        if pair is None:
            pair = self._pairs[key] = _Pair()
            while len(self._pairs) > _WINDOWS_KEPT:
                self._forget(min(self._pairs, key=lambda k: k[1]))
        return pair

    def _forget(self, key: tuple[str, int]) -> None:
        self._pairs.pop(key)
        self._unsettled.discard(key)
        self._wrong.pop(key, None)

    def _reopen(self, key: tuple[str, int], pair: _Pair) -> None:
        self._unsettle(key, pair)
        if pair.expected is not None and pair.expected["final"] and len(pair.actual) == 3:
            self._judge(key, pair, 0)  # what agrees is settled at once; what does not may still be on its way

    def _unsettle(self, key: tuple[str, int], pair: _Pair) -> None:
        if pair.settled is not None:
            self._counts[pair.settled.verdict] -= 1
            self._wrong.pop(key, None)
        pair.settled = None
        self._unsettled.add(key)

    def _note(self, key: tuple[str, int], pair: _Pair, found: Judgement) -> None:
        pair.settled = found
        self._counts[found.verdict] += 1
        self._unsettled.discard(key)
        if found.verdict is Verdict.WRONG:
            self._wrong[key] = found

    def _judge(self, key: tuple[str, int], pair: _Pair, now_ms: int) -> Judgement:
        if pair.settled is not None:
            return pair.settled
        if pair.expected is None:
            return Judgement(Verdict.PENDING, "not computed yet", 0)
        found = judge(pair.expected, pair.actual, now_ms)
        if found.verdict is Verdict.WRONG:
            cause = diagnose(pair.expected, pair.actual, self._expected_at, self._types[key[0]], key[1], self._types)
            found = Judgement(found.verdict, f"{found.reason} ({cause})" if cause else found.reason, found.difference)
        if found.verdict is not Verdict.PENDING and pair.expected["final"]:
            self._settle(key, pair, found)
        return found

    def _settle(self, key: tuple[str, int], pair: _Pair, found: Judgement) -> None:
        self._note(key, pair, found)
        if found.verdict is Verdict.WRONG:
            return
        assert pair.expected is not None
        pair.digest = _digest(pair.expected, pair.expected, pair.expected)
        self._slim(*key)

    def _slim(self, window_type: str, start_ms: int) -> None:
        """Forget the details of all but the newest settled windows of a type."""
        whole = self._whole.setdefault(window_type, set())
        whole.add(start_ms)
        while len(whole) > _DETAILS_KEPT:
            oldest = min(whole)
            whole.discard(oldest)
            pair = self._pairs.get((window_type, oldest))
            if pair is not None and pair.settled is not None and pair.expected is not None:
                pair.expected = {name: pair.expected[name] for name in (*_SUMMARY_FIELDS, "histogram")}
                pair.actual = {}

    def _expected_at(self, window_type: str, start_ms: int) -> Mapping[str, Any] | None:
        pair = self._pairs.get((window_type, start_ms))
        return pair.expected if pair else None


def difference_text(difference: int | None) -> str:
    """Actual count less the expected one, with its sign; a dash where nothing can be said yet."""
    if difference is None:
        return "–"
    return f"{difference:+,}" if difference else "0"


def _digest(total: Mapping[str, Any], topn: Mapping[str, Any], genres: Mapping[str, Any]) -> str:
    content = [*(total[name] for name in _TOTAL_FIELDS), topn["movies"], genres["genres"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
