"""What every window must hold, micro-batch by micro-batch, from regenerated ratings.

Reads no ratings and runs nothing of the Spark job's. What both take from one place is what a window is (lengths, slides and names:
:class:`WindowSpec`) and the catalogue (ids, genres); tests check those against arithmetic of their own.

The job says of each micro-batch how many ratings of each partition it had read at its end: a :class:`Cut` through the stream. The
ratings between two cuts are regenerated; which of them are too late for which window follows from the cuts before.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.codec import whole_in
from ray_pipeline.errors import RecordError
from ray_pipeline.events import HALF_STARS_MAX, EventBatch
from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.truth.outside import OutsideRatings
from ray_pipeline.truth.replay import ShardReplay
from ray_pipeline.windows.spec import WindowSpec, iso_ms

__all__ = ["Cut", "CutLog", "ExpectedWindows", "Watermark", "WindowId"]

WindowId = tuple[int, int]
"""Position in the window kinds, and end in epoch milliseconds."""

_HALVES = np.arange(1, HALF_STARS_MAX + 1)
_CLOSED_KEPT = 500
_COUNTED_BY = frozenset({"tumbling_s", "sliding_s", "slide_s", "watermark_s", "max_ahead_s", "ratings_topic"})
"""What decides which ratings a window holds, of what a job says that its windows are."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How far the job had read at the end of a micro-batch.

    Attributes:
        batch: its number.
        read: records of the shard read of each partition since its first one; a partition that is not named was not read.
        offsets: up to which offset (exclusive) each partition had been read; needed where there are ratings from outside.
        windows: what the windows are, as the job publishes it; None where it did not say so again.
        at_ms: when the job said so, wall clock, epoch milliseconds; 0 where that is not known.
    """

    batch: int
    read: Mapping[int, int]
    offsets: Mapping[int, int] = field(default_factory=dict)
    windows: Any = None
    at_ms: int = 0

    @property
    def top_n(self) -> int | None:
        """Movies in the top-N of windows that change from this micro-batch on; None where the job did not say so again."""
        return None if self.windows is None else int(self.windows["top_n"])

    def again(self, other: Cut) -> bool:
        """Whether it is of another cut's micro-batch, run again after a failure: with the same end, which another query's has not.

        By a job that was started otherwise, it may be: with all that ratings are counted by as it was.
        """
        if isinstance(self.windows, dict) and isinstance(other.windows, dict):
            said = _COUNTED_BY & self.windows.keys() & other.windows.keys()
            differs = {name for name in said if self.windows[name] != other.windows[name]}
            # another guard needs no other checkpoint where it turns away the same
            if differs - {"max_ahead_s"} or (differs and self.read != other.read):
                return False
        return self.batch == other.batch and self.offsets == other.offsets

    def anew(self, last: Cut | None) -> bool:
        """Whether it is of another query than the last cut, from the beginning."""
        return last is not None and self.batch <= last.batch and not self.again(last)

    @classmethod
    def from_record(cls, record: Any, outside: OutsideRatings) -> Cut:
        """A record of topic ``metrics.batches``, which counts valid records alone: others may have put more there.

        Where records are broken on purpose, see :meth:`in_records`.

        Args:
            record: its value, read from JSON.
            outside: the ratings from outside, all that the micro-batch can have read.

        Raises:
            RecordError: it is none.
        """
        try:
            if not isinstance(record, dict) or not isinstance(record.get("partitions"), dict):
                msg = "it names no partitions"
                raise ValueError(msg)
            batch, valid, offsets = whole_in(record, "batch"), {}, {}
            at_ms = whole_in(record, "at_ms") if "at_ms" in record else 0
            for name, of in record["partitions"].items():
                if not (name.isdecimal() and len(name) < 10 and isinstance(of, dict)):
                    msg = f"partition {name[:80]} is {str(of)[:80]}"
                    raise ValueError(msg)
                valid[int(name)], offsets[int(name)] = whole_in(of, "valid"), whole_in(of, "next_offset")
        except ValueError as error:
            raise RecordError(problem=f"it does not say what a micro-batch read: {error}") from error
        return cls(batch, valid, offsets, record.get("windows"), at_ms).without(outside)

    def without(self, outside: OutsideRatings) -> Cut:
        """The cut with the ratings from outside no longer counted."""
        read = {p: max(0, n - outside.before(p, self.offsets[p])) for p, n in self.read.items()}
        return replace(self, read=read)

    def in_records(self, replays: Mapping[int, ShardReplay]) -> Cut:
        """The cut with those counted that are broken on purpose, of the shards at hand."""
        read = {p: replays[p].records_read(n) if p in replays else n for p, n in self.read.items()}
        return replace(self, read=read)


class CutLog:
    """What each micro-batch of a query read, in order.

    Holds 8 bytes a micro-batch, and 16 for each partition of it; and what the windows are wherever the job has another top-N.

    Args:
        partitions: how many partitions the topic of ratings has.
    """

    def __init__(self, partitions: int) -> None:
        self.last: Cut | None = None
        self._batches = array("q")
        self._columns = [
            (array("q"), array("q")) for _ in range(partitions)
        ]  # valid records, next offset; -1 = not read
        self._windows: dict[int, Any] = {}  # by place
        self._top_n: int | None = None

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def last_batch(self) -> int:
        """Number of the last micro-batch; -1 without any."""
        return self.last.batch if self.last else -1

    def add(self, cut: Cut) -> None:
        """The next cut, or the last one again; with all that was read, ratings from outside too, and windows that can be.

        Raises:
            RecordError: it names a partition that is not there.
        """
        if cut.read and max(cut.read) >= len(self._columns):
            raise RecordError(problem=f"it names partition {max(cut.read)}, there are {len(self._columns)}")
        if self.last is None or not cut.again(self.last):
            self._batches.append(cut.batch)
            for p, (valid, offsets) in enumerate(self._columns):
                valid.append(cut.read.get(p, -1))
                offsets.append(cut.offsets.get(p, -1))
            self.last = cut
        if cut.top_n not in (None, self._top_n):
            self._windows[len(self) - 1], self._top_n = cut.windows, cut.top_n

    def cuts(self, outside: OutsideRatings) -> Iterator[Cut]:
        """The cuts, in order, without the ratings from outside, of which all must be known."""
        for n, batch in enumerate(self._batches):
            read = {p: valid[n] for p, (valid, _) in enumerate(self._columns) if valid[n] >= 0}
            offsets = {p: self._columns[p][1][n] for p in read}
            yield Cut(batch, read, offsets, self._windows.get(n)).without(outside)


@dataclass
class Watermark:
    """The watermark of a Spark query, batch by batch.

    A micro-batch is planned with the newest event time of the batches before it, less the delay; it forgets windows that ended by
    then. What is too late in it is judged by the watermark of the batch before (since Spark 3.4).

    Attributes:
        delay_ms: how long a window waits.
        late_ms: windows that end here or before are closed to the current micro-batch; -1 before the first.
        evict_ms: windows that end here or before are forgotten at the end of the current micro-batch; -1 before the first.
        newest_ms: newest event time so far; -1 before the first.
        moved_ms: when the rating was sent that the eviction goes by: what was sent later can be too late for what it closed.
    """

    delay_ms: int
    late_ms: int = -1
    evict_ms: int = -1
    newest_ms: int = -1
    moved_ms: int = -1
    _sent_ms: int = -1

    def next_batch(self) -> None:
        """A micro-batch begins."""
        self.late_ms, self.evict_ms = self.evict_ms, max(self.evict_ms, self.newest_ms - self.delay_ms)
        self.moved_ms = self._sent_ms

    def saw(self, event_ms: int, sent_ms: int) -> None:
        """The current micro-batch holds a rating of this time, sent then."""
        if event_ms > self.newest_ms:
            self.newest_ms, self._sent_ms = event_ms, sent_ms


@dataclass
class _Window:
    """Counts by movie and half stars, one row after another; and of what is not in it."""

    cells: npt.NDArray[np.int32]  # (movies * 10,)
    by_partition: dict[int, int] = field(default_factory=dict)
    outside: int = 0
    batch: int = -1
    top_n: int = 0  # that the job had in this micro-batch


class ExpectedWindows:
    """Keeps what the open windows must hold.

    Args:
        catalogue: movies and genres.
        specs: the window kinds.
        delay_ms: how long a window waits for late ratings, milliseconds.
        top_n: movies in a window's top-N, until a cut says otherwise.
        from_ms: windows that end here or before are left out; reading may begin that much later.
        outside: the ratings from outside; None = there are none.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        specs: tuple[WindowSpec, ...],
        delay_ms: int,
        top_n: int,
        from_ms: int = 0,
        outside: OutsideRatings | None = None,
    ) -> None:
        self.batch = -1
        self.specs = specs
        self.watermark = Watermark(delay_ms)
        self.late: dict[WindowId, int] = {}
        self.late_total = [0] * len(specs)
        self._catalogue = catalogue
        self._genres = catalogue.genre_matrix.astype(np.int64)
        self._top_n = top_n
        self._from_ms = from_ms
        self._outside = outside or OutsideRatings()
        self._read: dict[int, int] = {}
        self._offsets: dict[int, int] = {}
        self._open: dict[WindowId, _Window] = {}
        self._closed: dict[WindowId, _Window] = {}  # of those that the last micro-batch changed
        self._changed: set[WindowId] = set()

    @property
    def read(self) -> Mapping[int, int]:
        """Ratings of each partition up to the last cut."""
        return self._read

    def advance(self, cut: Cut, replays: Mapping[int, ShardReplay]) -> None:
        """Take the ratings up to a cut in.

        Args:
            cut: the next one. Where a partition has no more ratings than before, none are taken.
            replays: the shards; each must reach the cut.
        """
        self.advance_together([cut], replays)

    def advance_together(self, cuts: Sequence[Cut], replays: Mapping[int, ShardReplay]) -> None:
        """Take the ratings up to the last of some cuts in at once; more than one cut only where they :meth:`may_merge`."""
        before, read = dict(self._read), dict(self._read)
        posted: list[EventBatch] = []
        self._top_n = cuts[0].top_n or self._top_n
        self._closed.clear()
        for cut in cuts:
            self.watermark.next_batch()
            for events in self._posted(cut):
                self.watermark.saw(int(events.timestamps_ms[-1]), int(events.timestamps_ms[-1]))
                posted.append(events)
            self._offsets.update(cut.offsets)
            for partition, until in cut.read.items():
                if until > read.get(partition, 0):
                    newest = replays[partition].newest(read.get(partition, 0), until)
                    read[partition] = until
                    if newest is not None:
                        self.watermark.saw(*newest)
        self._read, self.batch = read, cuts[-1].batch
        late_ms = self.watermark.late_ms if len(cuts) == 1 else -1
        for partition, until in sorted(read.items()):
            first = before.get(partition, 0)
            if until > first:
                replay = replays[partition]
                for events in _in_pieces(replay, self._wanted_from(replay, first), until):
                    if len(events):
                        self._take(events, late_ms)
        for events in posted:
            self._take(events, late_ms, outside=True)

    def may_merge(self, cuts: Sequence[Cut], replays: Mapping[int, ShardReplay]) -> bool:
        """Whether some cuts may be taken as one: none of the ratings up to the last of them can be too late for any window.

        And the top-N is the same in all of them.
        """
        if any(cut.windows is not None for cut in cuts[1:]):
            return False
        read = {p: n for p, n in cuts[-1].read.items() if n > self._read.get(p, 0)}
        posted = self._posted(cuts[-1])
        if not read and not posted:
            return True
        newest = [replays[p].newest(self._read.get(p, 0), n) for p, n in read.items()]
        oldest = [replays[p].oldest_ms(self._read.get(p, 0), n) for p, n in read.items()]
        newest_times = [found[0] for found in newest if found is not None]
        newest_ms = max([*newest_times, *(int(events.timestamps_ms[-1]) for events in posted)], default=-1)
        oldest_times = [found for found in oldest if found is not None]
        oldest_ms = min([*oldest_times, *(int(events.timestamps_ms[0]) for events in posted)], default=newest_ms)
        # a window that holds a rating ends after it
        return oldest_ms >= max(newest_ms - self.watermark.delay_ms, self.watermark.newest_ms - self.watermark.delay_ms)

    def changed(self) -> list[WindowId]:
        """Windows that changed, or of which something came too late, since this was asked last; in order."""
        found = sorted(self._changed)
        self._changed.clear()
        return found

    def close(self) -> list[tuple[WindowId, dict[str, Any]]]:
        """Forget the windows that the watermark has passed; returns them with their last records, in order."""
        over = sorted(key for key in self._open if key[1] <= self.watermark.evict_ms)
        closed = [(key, self.record(key)) for key in over]
        for key in over:
            state = self._open.pop(key)
            if state.batch == self.batch:
                self._closed[key] = state
        return closed

    def ran_again(self, top_n: int) -> bool:
        """The last micro-batch ran again, by a job with this top-N: what it changes is as that one says.

        Returns:
            Whether it was another one. Then what the micro-batch had closed is open, until :meth:`close` is called once more.
        """
        if top_n == self._top_n:
            return False
        self._top_n = top_n
        self._open.update(self._closed)
        self._closed.clear()
        for key, state in self._open.items():
            if state.batch == self.batch:
                state.top_n = top_n
                self._changed.add(key)
        return True

    @property
    def open(self) -> list[WindowId]:
        """The open windows, in order."""
        return sorted(self._open)

    def record(self, window: WindowId) -> dict[str, Any]:
        """What an open window must hold, in the words of topic ``metrics.expected``."""
        kind, end_ms = window
        spec, state = self.specs[kind], self._open[window]
        cells = state.cells.reshape(-1, HALF_STARS_MAX)
        histogram = cells.sum(axis=0, dtype=np.int64)
        count, half_sum = cells.sum(axis=1, dtype=np.int64), cells @ _HALVES
        total = int(histogram.sum())
        return {
            "window_start": iso_ms(end_ms - spec.size_ms),
            "window_end": iso_ms(end_ms),
            "window_type": spec.name,
            "count": total,
            "avg_rating": _mean(int(histogram @ _HALVES), total),
            "p50": _percentile(histogram, 50),
            "p95": _percentile(histogram, 95),
            "histogram": histogram.tolist(),
            "movies": self._top(count, half_sum, state.top_n),
            "genres": self._by_genre(count, half_sum),
            "partitions": {str(p): n for p, n in sorted(state.by_partition.items())},
            "outside": state.outside,
            "late": self.late.get(window, 0),
            "batch": state.batch,
        }

    # -- inside

    def _posted(self, cut: Cut) -> list[EventBatch]:
        """Ratings from outside that were read since the last cut, each partition's in order of their times."""
        found = [self._outside.between(p, self._offsets.get(p, 0), end) for p, end in sorted(cut.offsets.items())]
        return [events for events in found if len(events)]

    def _wanted_from(self, replay: ShardReplay, first: int) -> int:
        """The first rating that falls into a window that is not left out."""
        longest_ms = max(spec.size_ms for spec in self.specs)
        return first if self._from_ms == 0 else max(first, replay.first_in(self._from_ms - longest_ms))

    def _take(self, events: EventBatch, late_ms: int, outside: bool = False) -> None:
        movies = self._catalogue.index_of(events.movie_ids)
        cells = movies * HALF_STARS_MAX + (events.half_stars.astype(np.int64) - 1)
        for kind, spec in enumerate(self.specs):
            newest_end = events.timestamps_ms - events.timestamps_ms % spec.slide_ms + spec.size_ms
            # the ratings of one slide are to lie together, as they do unless faults are on
            order = np.argsort(newest_end, kind="stable") if events.faults is not None else slice(None)
            newest_end, placed = newest_end[order], cells[order]
            starts = np.flatnonzero(np.diff(newest_end, prepend=-1)).tolist()
            for lo, hi in zip(starts, [*starts[1:], len(events)], strict=True):
                end_ms = int(newest_end[lo])
                for back in range(0, spec.size_ms, spec.slide_ms):
                    self._add((kind, end_ms - back), placed[lo:hi], events.partition, late_ms, outside)

    def _add(self, window: WindowId, cells: npt.NDArray[np.int64], partition: int, late_ms: int, outside: bool) -> None:
        if window[1] <= self._from_ms:
            return
        self._changed.add(window)
        if window[1] <= late_ms:
            self.late_total[window[0]] += len(cells)
            self.late[window] = self.late.get(window, 0) + len(cells)
            while len(self.late) > _CLOSED_KEPT:
                del self.late[min(self.late, key=lambda key: key[1])]
            return
        state = self._open.get(window)
        if state is None:
            state = self._open[window] = _Window(np.zeros(len(self._catalogue) * HALF_STARS_MAX, np.int32))
        np.add.at(state.cells, cells, 1)
        state.by_partition[partition] = state.by_partition.get(partition, 0) + len(cells)
        state.outside += len(cells) * outside
        state.batch, state.top_n = self.batch, self._top_n

    def _top(self, count: npt.NDArray[np.int64], half_sum: npt.NDArray[np.int64], top_n: int) -> list[dict[str, Any]]:
        rated = np.flatnonzero(count)
        order = rated[np.lexsort((self._catalogue.movie_ids[rated], -count[rated]))][:top_n]
        return [
            {
                "movieId": int(self._catalogue.movie_ids[i]),
                "count": int(count[i]),
                "avg_rating": _mean(int(half_sum[i]), int(count[i])),
            }
            for i in order.tolist()
        ]

    def _by_genre(self, count: npt.NDArray[np.int64], half_sum: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        rated = np.flatnonzero(count)
        of_genre = self._genres[rated].T
        rows = [
            {"genre": name, "count": n, "avg_rating": _mean(halves, n)}
            for name, n, halves in zip(
                self._catalogue.genre_names,
                (of_genre @ count[rated]).tolist(),
                (of_genre @ half_sum[rated]).tolist(),
                strict=True,
            )
            if n
        ]
        return sorted(rows, key=lambda row: (-row["count"], row["genre"]))


def _in_pieces(replay: ShardReplay, first: int, until: int, most: int = 1 << 17) -> Iterable[EventBatch]:
    for start in range(first, until, most):
        yield replay.valid_events(start, min(most, until - start))


def _mean(half_sum: int, count: int) -> float | None:
    return round(half_sum / (2 * count), 6) if count else None


def _percentile(histogram: npt.NDArray[np.int64], per_cent: int) -> float | None:
    """Nearest rank: the rating at place ceil(per_cent / 100 · n) in ascending order, stars."""
    total = int(histogram.sum())
    if not total:
        return None
    place = -(-per_cent * total // 100)
    return int(np.searchsorted(np.cumsum(histogram), place) + 1) / 2
