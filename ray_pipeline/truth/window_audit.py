"""Compares the windows of topic ``metrics`` with what they must hold, after the fact. Pure: a shell reads the topics."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ray_pipeline.codec import number_in, parse_object, text_in, whole_in
from ray_pipeline.config import Settings
from ray_pipeline.errors import RecordError
from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.truth.audit import Finding
from ray_pipeline.truth.oracle import expected_key, published_windows
from ray_pipeline.truth.outside import OutsideRatings
from ray_pipeline.truth.replay import ShardReplay
from ray_pipeline.truth.verdict import compare, diagnose
from ray_pipeline.truth.windows import Cut, CutLog, ExpectedWindows
from ray_pipeline.windows.spec import WindowSpec, epoch_ms, iso_ms, window_specs

__all__ = ["WindowAudit", "WindowsVerdict"]

_LISTED = 20
_TOGETHER = 200_000
_AHEAD = 2_000
_ROWS: dict[str, tuple[str, str, Callable[[Mapping[str, Any], str], Any]]] = {
    "topn": ("movies", "movieId", whole_in),
    "genres": ("genres", "genre", text_in),
}


@dataclass
class WindowsVerdict:
    """What is wrong with the windows.

    Attributes:
        checked: windows that were compared.
        wrong: windows that are not as they must be, and records that are no window's.
        late_dropped: ratings of tumbling windows that came too late, as computed here.
        pending: open windows that the job changed while the topics were read, or last before it was killed.
        other_definition: records of windows that an earlier query may have made which has not said what its windows are.
        findings: the first of what is wrong.
    """

    checked: int = 0
    wrong: int = 0
    late_dropped: int = 0
    pending: int = 0
    other_definition: int = 0
    findings: list[Finding] = field(default_factory=list)

    def note(self, detail: str) -> None:
        """List a window or a record that is wrong, unless there is enough of it."""
        if len(self.findings) < _LISTED:
            self.findings.append(Finding("window", None, None, None, detail))


@dataclass(frozen=True, slots=True)
class _There:
    """The newest record of a key; no value = it was deleted."""

    offset: int
    value: bytes | None


@dataclass
class _Query:
    """A query of the job, from its first micro-batch on: with another checkpoint another one begins.

    Attributes:
        log: what its micro-batches read.
        settings: the run's, with the windows that it makes; None = that is not known.
    """

    log: CutLog
    settings: Settings | None = None

    @property
    def specs(self) -> tuple[WindowSpec, ...]:
        """The window kinds, as far as known."""
        return window_specs(self.settings) if self.settings else ()


class WindowAudit:
    """Takes records of the job's topics in; :meth:`compare` says what is wrong.

    A window is what the newest query made of it that has come to it: one that an earlier query left, such as of another length, must be
    as that one read it.

    Holds each window's newest records as they are, until they are compared; of each window that was, its histogram; and each
    micro-batch's numbers (:class:`CutLog`).

    Args:
        settings: the run's, with the windows that the job has published last.
    """

    def __init__(self, settings: Settings) -> None:
        self.verdict = WindowsVerdict()
        self._settings = settings
        self._sizes_ms: dict[str, int] = {}
        self._queries = [_Query(CutLog(settings.partitions))]
        self._newest_batch = -1
        self._later: Cut | None = None
        self._engine: ExpectedWindows | None = None
        self._replays: Mapping[int, ShardReplay] = {}
        self._there: dict[str, dict[str, _There]] = {}  # by window, then view
        self._histograms: dict[tuple[str, int], array[int]] = {}
        self._to_explain: list[tuple[dict[str, Any], dict[str, Any], str]] = []
        self._span_ms: tuple[int, int | None] = (0, None)

    # -- records in

    def take_cut(self, offset: int, value: bytes | None) -> None:
        """A record of topic ``metrics.batches``, before any of ``metrics``."""
        before = self._log.last_batch
        try:
            self._add(Cut.from_record(parse_object(value), OutsideRatings()))
            last = self._log.last_batch
            wrong = f"micro-batches {before + 1:,} to {last - 1:,} are not there" if before < last - 1 else ""
        except RecordError as error:
            wrong = error.problem
        if wrong:
            self.verdict.wrong += 1
            self.verdict.note(
                f"the record at offset {offset} of topic {self._settings.batches_topic} is wrong: {wrong}"
            )
        self._newest_batch = max(self._newest_batch, self._log.last_batch)

    @property
    def _log(self) -> CutLog:
        """What the newest query read."""
        return self._queries[-1].log

    def _add(self, cut: Cut) -> None:
        query = self._queries[-1]
        if cut.anew(query.log.last):
            query = _Query(CutLog(self._settings.partitions))
        said = query.settings if cut.windows is None else published_windows(self._settings, cut.windows)
        query.log.add(cut)
        query.settings = said
        if query is not self._queries[-1]:
            self._queries.append(query)

    def take_window(self, offset: int, key: str, value: bytes | None) -> None:
        """A record of topic ``metrics``."""
        window, _, view = key.rpartition("|")
        self._there.setdefault(window, {})[view] = _There(offset, value)

    def take_later_cut(self, value: bytes | None) -> None:
        """A record of topic ``metrics.batches`` that was written since: the job goes on."""
        try:
            later = Cut.from_record(parse_object(value), OutsideRatings())
        except RecordError:  # it is named by who comes later
            return
        if later.batch == self._newest_batch + 1:
            self._newest_batch, self._later = later.batch, later

    # -- what is wrong

    def compare(
        self,
        catalogue: Catalogue,
        replays: Mapping[int, ShardReplay],
        outside: OutsideRatings,
        from_ms: int | None,
        to_ms: int | None,
    ) -> WindowsVerdict:
        """Compare all windows; once. What was not read is another question: :meth:`unread`.

        Args:
            catalogue: the run's movies.
            replays: the shards.
            outside: the ratings from outside.
            from_ms: windows that begin before are left out, epoch milliseconds.
            to_ms: windows that end after it are left out; None = none.
        """
        self._span_ms = (from_ms or 0, to_ms)
        newest = self._queries[-1]
        newest.settings = newest.settings or self._settings
        engine = self._of_query(newest, newest.settings, catalogue, replays, outside)
        for query in reversed(self._queries[:-1]):
            new = {spec.name for spec in query.specs} - self._sizes_ms.keys()
            if query.settings is not None and (new or self._there):
                self._of_query(query, query.settings, catalogue, replays, outside)
        self._rest()
        self._explain()
        self.verdict.late_dropped = engine.late_total[0]
        self._engine, self._replays = engine, replays
        return self.verdict

    def _of_query(
        self,
        query: _Query,
        settings: Settings,
        catalogue: Catalogue,
        replays: Mapping[int, ShardReplay],
        outside: OutsideRatings,
    ) -> ExpectedWindows:
        """Compare the windows that a query has come to, and no later one."""
        self._sizes_ms.update({spec.name: spec.size_ms for spec in query.specs})
        delay_ms = round(settings.watermark_s * 1000)
        engine = ExpectedWindows(catalogue, query.specs, delay_ms, settings.top_n, self._span_ms[0], outside)
        cuts = (_of_shards(cut, replays) for cut in query.log.cuts(outside))
        ahead: list[Cut] = []
        while True:
            ahead += islice(cuts, _AHEAD - len(ahead))
            if not ahead:
                break
            together = _together(engine, ahead, replays)
            engine.advance_together(ahead[:together], replays)
            del ahead[:together]
            for _, record in engine.close():
                self._one(query, record, final=True)
        for window in engine.open:
            self._one(query, engine.record(window), final=False)
        return engine

    def unread(self, outside: OutsideRatings) -> WindowsVerdict:
        """Windows that are final although ratings of them have not been read, by the later cuts either; after :meth:`compare`.

        Of a job that goes on it may be so for a moment: a rating that was sent too late for them waits for the next micro-batch too.

        Args:
            outside: the ratings from outside, all that the later cuts can have read.
        """
        assert self._engine is not None
        found, read = WindowsVerdict(), dict(self._engine.read)
        if self._later is not None:
            read.update(_of_shards(self._later.without(outside), self._replays).read)
        for partition, replay in sorted(self._replays.items()):
            if read.get(partition, 0) < replay.progress.next_index:
                unread = self._unread_of if replay.valid is not None else self._unread
                unread(found, replay, read.get(partition, 0), self._engine)
        return found

    def _one(self, query: _Query, expected: dict[str, Any], final: bool) -> None:
        """Compare one window, unless a later query has come to it."""
        start_ms, newest = epoch_ms(expected["window_start"]), query is self._queries[-1]
        if not newest and (expected["window_type"], start_ms) in self._histograms:
            return
        there = self._there.pop(expected_key(expected), {})
        self._histograms[expected["window_type"], start_ms] = array("q", expected["histogram"])
        if not self._wanted(start_ms, epoch_ms(expected["window_end"])):
            return
        actual, broken = _read(there)
        wrong = broken or compare(expected, actual)
        if not broken and (not final if newest else wrong) and self._pending(expected["window_type"], actual):
            self.verdict.pending += 1  # the job went on while this was read
            return
        self.verdict.checked += 1
        if not wrong:
            return
        self.verdict.wrong += 1
        deleted = [f"{view} at offset {at.offset}" for view, at in there.items() if at.value is None]
        text = f"window {expected['window_type']} from {expected['window_start']} {wrong}"
        if deleted:
            text += f" (deleted: {', '.join(deleted)})"
        if broken or deleted or len(self._to_explain) >= _LISTED:
            self.verdict.note(text)
        else:
            self._to_explain.append((expected, actual, text))

    def _explain(self) -> None:
        """Name what wrong windows look like: for that, all windows must be known."""

        def at(window_type: str, start_ms: int) -> dict[str, Any] | None:
            found = self._histograms.get((window_type, start_ms))
            return None if found is None else {"count": sum(found), "histogram": found.tolist()}

        for expected, actual, text in self._to_explain:
            name, start_ms = expected["window_type"], epoch_ms(expected["window_start"])
            cause = diagnose(expected, actual, at, self._sizes_ms[name], start_ms, self._sizes_ms)
            self.verdict.note(f"{text} ({cause})" if cause else text)

    def _rest(self) -> None:
        """What is left is expected by nobody."""
        for key, there in sorted(self._there.items()):
            name, _, start = key.rpartition("|")
            actual, broken = _read(there)
            if not (actual or broken) or not self._wanted_key(name, start):
                continue
            if not broken and self._pending(name, actual):
                self.verdict.pending += 1
                continue
            if not broken and name not in self._sizes_ms and any(query.settings is None for query in self._queries):
                self.verdict.other_definition += 1
                continue
            self.verdict.wrong += 1
            what = broken or "is there, no rating belongs to it"
            first = min(at.offset for at in there.values() if at.value is not None)
            self.verdict.note(
                f"window {name[:80]} from {start[:80]} {what} (offset {first} of topic {self._settings.metrics_topic})"
            )

    def _pending(self, name: str, actual: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether the job has changed a window since the last micro-batch that was looked at: it may be within the next one.

        Or has not changed it yet, when its query began anew; or had begun to, when a former query was killed.
        """
        newest = max((record["batch"] for record in actual.values()), default=-1)
        for query in self._queries:
            last = self._newest_batch if query is self._queries[-1] else query.log.last_batch
            if query.log.last_batch < newest <= last + 1 and name in {spec.name for spec in query.specs}:
                return True
        return False

    def _wanted_key(self, name: str, start: str) -> bool:
        try:
            start_ms = epoch_ms(start)
        except (ValueError, OverflowError):
            return True
        return self._wanted(start_ms, start_ms + self._sizes_ms.get(name, 0))

    def _wanted(self, start_ms: int, end_ms: int) -> bool:
        """Only windows that lie within what is looked at: the others hold ratings that were left out."""
        from_ms, to_ms = self._span_ms
        return start_ms >= from_ms and (to_ms is None or end_ms <= to_ms)

    @staticmethod
    def _unread(found: WindowsVerdict, replay: ShardReplay, read: int, engine: ExpectedWindows) -> None:
        """Add the windows that are final without ratings of a shard."""
        sent, first_ms = replay.progress.next_index, replay.due_ms(read)
        for spec in engine.specs:
            last_ms = min(replay.due_ms(sent - 1), engine.watermark.evict_ms)
            end_ms = first_ms - first_ms % spec.slide_ms + spec.slide_ms
            if end_ms <= engine.watermark.evict_ms:
                found.wrong += max(1, (last_ms - end_ms) // spec.slide_ms + 1)
                text = (
                    f"{sent - read:,} ratings of partition {replay.partition} from {iso_ms(first_ms)} on have not been read, but "
                    f"windows of {spec.name} that they belong to are final"
                )
                found.findings.append(Finding("window", replay.partition, read, None, text))

    @staticmethod
    def _unread_of(found: WindowsVerdict, replay: ShardReplay, read: int, engine: ExpectedWindows) -> None:
        """The same, of a shard whose records are broken on purpose: some of them are too late by design."""
        sent, mark = replay.progress.next_index, engine.watermark
        for spec in engine.specs:
            # a window that ended by then is final, and so is each that a rating from before it belongs to
            last_end_ms = mark.evict_ms - mark.evict_ms % spec.slide_ms
            count = replay.unread(read, sent, 0, last_end_ms, mark.moved_ms)
            if count:
                found.wrong += 1
                text = (
                    f"{count:,} ratings of partition {replay.partition} have not been read, but windows of {spec.name} that they "
                    "belong to are final"
                )
                found.findings.append(Finding("window", replay.partition, read, None, text))


def _of_shards(cut: Cut, replays: Mapping[int, ShardReplay]) -> Cut:
    """A cut in records of the shards; what is not theirs is no rating that could be regenerated: it shows among the records."""
    said = cut.in_records(replays).read
    return replace(cut, read={p: min(n, replays[p].progress.next_index) for p, n in said.items() if p in replays})


def _together(engine: ExpectedWindows, cuts: list[Cut], replays: Mapping[int, ShardReplay]) -> int:
    """How many of the next cuts to take at once: many small ones cost more than the ratings between them."""
    before = sum(engine.read.values())
    most = next((n for n, cut in enumerate(cuts) if sum(cut.read.values()) - before > _TOGETHER), len(cuts))
    while most > 1 and not engine.may_merge(cuts[:most], replays):
        most //= 2
    return max(1, most)


def _read(there: Mapping[str, _There]) -> tuple[dict[str, dict[str, Any]], str]:
    """The records of a window that are there, by view; and what is wrong with the first one that is none."""
    actual: dict[str, dict[str, Any]] = {}
    for view, at in sorted(there.items()):
        if at.value is None:
            continue
        try:
            actual[view] = _record(view, at.value)
        except ValueError as error:
            return actual, f"has a record at offset {at.offset} that is no view of it: {error}"
    return actual, ""


def _record(view: str, value: bytes) -> dict[str, Any]:
    """A record of topic ``metrics``; all that is compared is of the right kind.

    Raises:
        ValueError: it is none.
    """
    record = parse_object(value)
    if record is None or not (view == "total" or view in _ROWS):
        msg = (
            f"{view[:80] or 'nothing'} is none of total, topn, genres" if record is not None else "it is no JSON object"
        )
        raise ValueError(msg)
    for name in ("window_type", "window_start", "window_end", "kind"):
        text_in(record, name)
    if record["kind"] != view:
        msg = f"kind is {record['kind'][:80]}"
        raise ValueError(msg)
    for name in ("count", "batch"):
        whole_in(record, name)
    for name in ("avg_rating", "p50", "p95") if view == "total" else ("avg_rating",):
        number_in(record, name)
    if view == "total":
        _list_of(record, "histogram", int)
    else:
        rows, name, check = _ROWS[view]
        for row in _list_of(record, rows, dict):
            check(row, name)
            whole_in(row, "count")
            number_in(row, "avg_rating")
    return record


def _list_of(record: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    found = record.get(name)
    if not isinstance(found, list) or any(type(one) is not kind for one in found):
        msg = f"{name} is {str(found)[:80]}"
        raise ValueError(msg)
    return found
