"""Compares what a partition holds with the ratings it must hold, record by record, in bounded memory.

A record is *ours* when its user, movie, rating and time are those of one rating of the shard: that rating's index is the
record's identity, wherever it stands. Records that stand in the order of their indexes are in order; which of the others
are out of order is decided by the longest increasing run, so as few as possible are. What is no rating of the shard is *altered*
where it stands in a gap and shares enough with the rating that must be there, else *foreign*.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_pipeline.codec import encode_keys, encode_values, parse_object
from ray_pipeline.events import EventBatch
from ray_pipeline.truth.replay import ShardReplay
from ray_pipeline.truth.rise import longest_rise

__all__ = ["KINDS", "Finding", "PartitionAudit", "PartitionVerdict"]

KINDS = ("missing", "repeated", "altered", "out_of_order", "foreign", "beyond")
"""Kinds of wrong records. ``beyond``: ours, but more than the shard says it has sent."""

_BLOCK = 8192
_IN_STEP = 16
_REGION_MOST = 20_000
_NEAR = 64
_LISTED = 20
_FIELDS = ("userId", "movieId", "rating", "timestamp")
_FAR = 2**53


@dataclass(frozen=True, slots=True)
class Finding:
    """One wrong record, or a gap.

    Attributes:
        kind: one of :data:`KINDS`, ``progress`` or ``window``.
        partition: the partition; None for windows.
        index: index of the rating it is about; None when it is about none.
        offset: the record's offset; for a gap that of the record behind it; None at the end.
        detail: what is wrong, in words.
    """

    kind: str
    partition: int | None
    index: int | None
    offset: int | None
    detail: str

    def __str__(self) -> str:
        """In a line."""
        places = {"partition": self.partition, "index": self.index, "offset": self.offset}
        where = ", ".join(f"{name} {at}" for name, at in places.items() if at is not None)
        return ": ".join(filter(None, (self.kind, where, self.detail)))


@dataclass
class PartitionVerdict:
    """What is wrong with a partition.

    Attributes:
        partition: the partition.
        expected: ratings it must hold.
        found: records it holds, but for those from outside.
        outside: ratings from outside that it holds, as it must.
        counts: wrong ones, by kind.
        findings: the first of each kind.
        by_design: records among the expected ones that are broken on purpose, by kind; they are counted as right.
    """

    partition: int
    expected: int
    found: int = 0
    outside: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    findings: list[Finding] = field(default_factory=list)
    by_design: dict[str, int] = field(default_factory=dict)

    @property
    def agreed(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.counts.values())


@dataclass(frozen=True, slots=True)
class _Found:
    offset: int
    key: bytes | None
    value: bytes | None
    index: int | None


class _Expected:
    """Keys and values of the shard's ratings, made a block at a time."""

    def __init__(self, replay: ShardReplay) -> None:
        self._replay = replay
        self._first = -1
        self._keys: list[bytes] = []
        self._values: list[bytes | None] = []
        self._events: EventBatch | None = None

    def columns(self, first: int, count: int) -> EventBatch:
        """At most ``count`` ratings from ``first`` on; at least one."""
        self.slice(first, 1)
        assert self._events is not None
        at = first - self._first
        return self._events.slice(at, at + count)

    def slice(self, first: int, count: int) -> tuple[list[bytes], list[bytes | None]]:
        """Keys and values of at most ``count`` ratings from ``first`` on; at least one."""
        if not self._first <= first < self._first + len(self._values):
            events = self._events = self._replay.events(first, _BLOCK)
            self._first, self._keys, self._values = first, encode_keys(events), encode_values(events)
        at = first - self._first
        return self._keys[at : at + count], self._values[at : at + count]

    def one(self, index: int) -> tuple[bytes, bytes | None]:
        keys, values = self.slice(index, 1)
        return keys[0], values[0]


class _Gaps:
    """Indexes that were passed over, as disjoint intervals in ascending order, each with the offset behind it."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._offsets: list[int | None] = []

    def add(self, indexes: Sequence[int], offset: int | None) -> None:
        """Add ascending indexes that lie behind all that are there."""
        for index in indexes:
            if self._ends and self._ends[-1] == index and self._offsets[-1] == offset:
                self._ends[-1] = index + 1
            else:
                self.add_interval(index, index + 1, offset)

    def add_interval(self, start: int, end: int, offset: int | None) -> None:
        if end > start:
            self._starts.append(start)
            self._ends.append(end)
            self._offsets.append(offset)

    def remove(self, index: int) -> bool:
        """Take an index out; whether it was there."""
        at = bisect_right(self._starts, index) - 1
        if at < 0 or index >= self._ends[at]:
            return False
        start, end, offset = self._starts[at], self._ends[at], self._offsets[at]
        parts = [(a, b) for a, b in ((start, index), (index + 1, end)) if b > a]
        self._starts[at : at + 1] = [a for a, _ in parts]
        self._ends[at : at + 1] = [b for _, b in parts]
        self._offsets[at : at + 1] = [offset] * len(parts)
        return True

    def intervals(self) -> Iterable[tuple[int, int, int | None]]:
        return zip(self._starts, self._ends, self._offsets, strict=True)


class PartitionAudit:
    """Takes a partition's records in order; :meth:`finish` says what is wrong.

    Args:
        replay: the shard.
        expected: how many ratings it must hold, from index 0 on.
        first: ratings before this index are left out.
        bounded: whether what lies behind the expected ones is left out too, in place of being beyond.
        is_outside: whether a record (offset, key, value) is one of the ratings that came from outside, of which a record was
            kept; asked only of records that are not the next rating of the shard.
    """

    def __init__(
        self,
        replay: ShardReplay,
        expected: int,
        first: int = 0,
        bounded: bool = False,
        is_outside: Callable[[int, bytes | None, bytes | None], bool] = lambda *_: False,
    ) -> None:
        self._verdict = PartitionVerdict(replay.partition, max(0, expected - first))
        self._replay = replay
        self._end = expected
        self._first = first
        self._bounded = bounded
        self._is_outside = is_outside
        self._next = first  # all ratings before it were seen, or are in the gaps
        self._expected = _Expected(replay)
        # other blocks, for records that stand out of place, and for the far end of a gap
        self._elsewhere, self._at_the_end = _Expected(replay), _Expected(replay)
        self._gaps = _Gaps()
        self._early: dict[int, int] = {}  # ratings that came before their turn: index → offset
        self._region: list[_Found] = []  # since the last record that agreed
        self._run = 0
        self._guess = first

    @property
    def reached(self) -> int:
        """All ratings before this index were seen, or passed over."""
        return self._next

    def take(self, keys: list[bytes | None], values: list[bytes | None], offset_of: Callable[[int], int]) -> None:
        """Take the next records.

        Args:
            keys: their keys.
            values: their values.
            offset_of: gives the offset of the record at a position of these lists.
        """
        at = 0
        self._verdict.found += len(values)
        while at < len(values):
            if not self._region:
                at += self._agreeing(keys, values, at)
                if self._bounded and self._next >= self._end:
                    self._verdict.found -= len(values) - at
                    return
                if at == len(values):
                    return
            if self._is_outside(offset_of(at), keys[at], values[at]):
                self._verdict.found -= 1
                self._verdict.outside += 1
            else:
                self._examine(_Found(offset_of(at), keys[at], values[at], self._identify(values[at])))
            at += 1

    def finish(self, sent: Callable[[], int] | None = None) -> PartitionVerdict:
        """No more records come.

        Args:
            sent: tells how many ratings the shard says by now it has sent: it may have gone on while this was read. Asked only when
                there are more than it said at first.
        """
        if self._region:
            self._resolve()
        last = self._end
        if sent is not None and (self._next > last or any(index >= last for index in self._early)):
            last = max(last, sent())
        if self._end > self._next:
            self._skip(range(self._next, self._end), None)
            self._next = self._end
        for index, offset in sorted(self._early.items()):
            self._list(
                "beyond" if index >= last else "out_of_order",
                index,
                offset,
                "stands at the end, others are missing before it",
            )
        if self._next > last:
            self._count("beyond", self._next - last)
            text = f"{self._next - last:,} ratings are there that the shard does not say it has sent: it says {last:,}"
            self._note(Finding("beyond", self._replay.partition, last, None, text))
        for start, end, behind in self._gaps.intervals():
            text = (
                f"rating {start:,} is missing" if end == start + 1 else f"ratings {start:,} to {end - 1:,} are missing"
            )
            self._count("missing", end - start)
            self._note(Finding("missing", self._replay.partition, start, behind, text))
        self._verdict.by_design = self._replay.broken_on_purpose(self._first, max(self._first, self._end))
        return self._verdict

    # -- in step

    def _agreeing(self, keys: list[bytes | None], values: list[bytes | None], at: int) -> int:
        """How many records from ``at`` on are the next ratings, byte for byte."""
        began = at
        while at < len(values):
            most = len(values) - at
            if self._bounded:
                most = min(most, self._end - self._next)
                if most <= 0:
                    break
            wanted_keys, wanted = self._expected.slice(self._next, most)
            there, there_keys = values[at : at + len(wanted)], keys[at : at + len(wanted)]
            same = len(wanted)
            if there != wanted or there_keys != wanted_keys:
                pairs = zip(there, there_keys, wanted, wanted_keys, strict=True)
                same = next(n for n, (v, k, w, wk) in enumerate(pairs) if v != w or k != wk)
            self._pass(same)
            at += same
            if same < len(wanted):
                break
        return at - began

    def _pass(self, count: int) -> None:
        """The next ratings stand where they must."""
        if self._early:
            for index in [i for i in self._early if self._next <= i < self._next + count]:
                self._list(
                    "repeated", index, self._early.pop(index), "an earlier copy of a rating that stands in its place"
                )
        self._next += count
        self._guess = self._next

    # -- out of step

    def _identify(self, value: bytes | None) -> int | None:
        """The index of the rating that a record is; None when it is none of the shard's."""
        if value == self._elsewhere.one(self._guess)[1]:
            self._guess += 1
            return self._guess - 1
        index = self._replay.index_of(value, self._next)
        if index is not None:
            self._guess = index + 1
        return index

    def _examine(self, record: _Found) -> None:
        index = record.index
        if index is not None and (index < self._first or (self._bounded and index >= self._end)):
            self._verdict.found -= 1
            return
        if index is None and not self._region and self._before_first(record):
            self._verdict.found -= 1
            return
        if index is not None and index < self._next:
            self._came_late(index, record)
            return
        last = self._region[-1].index if self._region else None
        self._run = (
            self._run + 1 if index is not None and last is not None and index == last + 1 else int(index is not None)
        )
        self._region.append(record)
        if self._run >= _IN_STEP or len(self._region) >= _REGION_MOST:
            self._resolve()

    def _before_first(self, record: _Found) -> bool:
        """Whether a record that is none of ours is from before what is looked at."""
        if self._first == 0 or self._next > self._first:
            return False
        at_ms = _whole((parse_object(record.value) or {}).get("timestamp"))
        # one that tells no time counts as one: nothing of what is looked at has come yet
        return at_ms < self._replay.due_ms(self._first)

    def _came_late(self, index: int, record: _Found) -> None:
        if self._gaps.remove(index):
            self._list("out_of_order", index, record.offset, "comes after ratings that follow it")
        else:
            self._list("repeated", index, record.offset, "is there already")

    def _resolve(self) -> None:
        """Say of each record in the region what it is."""
        region, self._region, self._run = self._region, [], 0
        region = self._without_repeats(region)
        known = [(n, r.index) for n, r in enumerate(region) if r.index is not None]
        in_order = {known[at][0] for at in longest_rise([index for _, index in known], strictly=True)}
        ordered = {region[n].index for n in in_order}
        last = max((i for i in ordered if i is not None), default=self._next - 1)
        moved: dict[int, int] = {}
        for record in region:
            if record.index is not None and record.index not in ordered:
                (moved if record.index < last else self._early)[record.index] = record.offset
        strangers: list[_Found] = []
        for n, record in enumerate(region):
            if record.index is None:
                strangers.append(record)
            elif n in in_order:
                self._fill(range(self._next, record.index), strangers, moved, record.offset)
                self._check_text(record)
                self._next, strangers = record.index + 1, []
        if strangers:
            # nothing follows that would say how far they reach: at most as far as there are
            self._fill(range(self._next, self._next + len(strangers)), strangers, moved, None, open_end=True)
        self._guess = self._next

    def _without_repeats(self, region: list[_Found]) -> list[_Found]:
        seen: set[int] = set()
        kept = []
        for record in region:
            if record.index is not None and (record.index in seen or record.index in self._early):
                self._list("repeated", record.index, record.offset, "is there already")
                continue
            if record.index is not None:
                seen.add(record.index)
            kept.append(record)
        return kept

    def _fill(
        self, gap: range, strangers: list[_Found], moved: dict[int, int], behind: int | None, open_end: bool = False
    ) -> None:
        """Account for the ratings of a gap, and for the records of others that stand in it."""
        altered, reached = self._pair(gap, strangers)
        if open_end:
            gap = range(gap.start, reached)
            self._next = max(self._next, reached)
        if not altered and not moved and not self._early:
            self._skip(gap, behind)
            return
        missing = []
        for index in gap if len(gap) <= _REGION_MOST else self._near_known(gap, altered, moved, behind):
            if index in altered:
                continue
            offset = moved.pop(index, None)
            offset = self._early.pop(index, None) if offset is None else offset
            if offset is None:
                missing.append(index)
            else:
                self._list("out_of_order", index, offset, "does not stand where it must")
        self._gaps.add(missing, behind)

    def _near_known(
        self, gap: range, altered: dict[int, _Found], moved: dict[int, int], behind: int | None
    ) -> list[int]:
        """Of a wide gap: the indexes of which something is known; the stretches between them are passed over."""
        known = sorted(i for i in {*altered, *moved, *self._early} if i in gap)
        start = gap.start
        for index in known:
            self._gaps.add_interval(start, index, behind)
            start = index + 1
            if index in altered:
                continue
            offset = moved.pop(index, None)
            offset = self._early.pop(index, None) if offset is None else offset
            if offset is not None:
                self._list("out_of_order", index, offset, "does not stand where it must")
        self._gaps.add_interval(start, gap.stop, behind)
        return []

    def _pair(self, gap: range, strangers: list[_Found]) -> tuple[dict[int, _Found], int]:
        """Find for each stranger in a gap the rating that it may once have been; else it is foreign."""
        altered: dict[int, _Found] = {}
        start = gap.start
        for n, record in enumerate(strangers):
            found = self._likely(record, self._elsewhere, start, min(start + _NEAR, gap.stop))
            if found is None:
                behind = max(start + _NEAR, gap.stop - _NEAR - (len(strangers) - n))
                found = self._likely(record, self._at_the_end, behind, gap.stop)
            if found is None:
                self._list("foreign", None, record.offset, f"no rating of the shard: {_shown(record.value)}")
            else:
                altered[found] = record
                self._list("altered", found, record.offset, self._alteration(record, found))
                start = found + 1
        return altered, start

    def _likely(self, record: _Found, expected: _Expected, start: int, stop: int) -> int | None:
        """The first rating in a stretch that a record may once have been: with which it shares enough."""
        if start >= stop:
            return None
        events = expected.columns(start, stop - start)
        has = parse_object(record.value)
        keyed = events.user_ids == _number(record.key)
        if has is None:
            enough = keyed
        else:
            same = [
                events.user_ids == _whole(has.get("userId")),
                events.movie_ids == _whole(has.get("movieId")),
                events.half_stars == 2 * _stars(has.get("rating")),
                events.timestamps_ms == _whole(has.get("timestamp")),
            ]
            shared = np.sum(same, axis=0)
            # two alone are too few, unless they are the user's key and what few ratings share: movie or time
            enough = (shared >= 3) | ((shared == 2) & keyed & (same[1] | same[3]))
        at = np.flatnonzero(enough)
        return start + int(at[0]) if len(at) else None

    def _alteration(self, record: _Found, index: int) -> str:
        """How a record differs from the rating that it may once have been."""
        key, value = self._replay_of(index)
        must, has = parse_object(value), parse_object(record.value)
        if has is None or must is None:
            return f"the value is {_shown(record.value)}, must be {_shown(value)}"
        parts = [f"{n} is {has.get(n)}, must be {must.get(n)}" for n in _FIELDS if has.get(n) != must.get(n)]
        if record.key != key:
            parts.append(f"the key is {_shown(record.key)}, must be {key.decode()}")
        return ", ".join(parts) or f"the value is written {_shown(record.value)}"

    def _replay_of(self, index: int) -> tuple[bytes, bytes | None]:
        events = self._replay.events(index, 1)
        return encode_keys(events)[0], encode_values(events)[0]

    def _check_text(self, record: _Found) -> None:
        """A rating in its place whose bytes differ all the same."""
        assert record.index is not None
        key, value = self._elsewhere.one(record.index)
        if record.key != key:
            self._list(
                "altered", record.index, record.offset, f"the key is {_shown(record.key)}, must be {key.decode()}"
            )
        elif record.value != value:
            self._list("altered", record.index, record.offset, f"the value is written {_shown(record.value)}")

    # -- what is noted

    def _skip(self, gap: range, behind: int | None) -> None:
        self._gaps.add_interval(gap.start, gap.stop, behind)

    def _list(self, kind: str, index: int | None, offset: int, detail: str) -> None:
        self._count(kind, 1)
        what = f"rating {index:,} " if index is not None and kind in ("repeated", "out_of_order", "beyond") else ""
        self._note(Finding(kind, self._replay.partition, index, offset, f"{what}{detail}"))

    def _count(self, kind: str, n: int) -> None:
        self._verdict.counts[kind] += n

    def _note(self, finding: Finding) -> None:
        if sum(1 for f in self._verdict.findings if f.kind == finding.kind) < _LISTED:
            self._verdict.findings.append(finding)


def _number(key: bytes | None) -> int:
    return int(key) if key is not None and key.isdigit() and len(key) < 16 else -1


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _FAR else -1


def _stars(value: Any) -> float:
    return (
        float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _FAR else -1.0
    )


def _shown(data: bytes | None) -> str:
    return "nothing" if data is None else data.decode(errors="replace")[:120]
