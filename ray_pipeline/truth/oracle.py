"""What the windows must hold, kept up with the stream: published records in, records of topic ``metrics.expected`` out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ray_pipeline.codec import number_in, text_in, whole_in
from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import RecordError
from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.truth.outside import OutsideRatings
from ray_pipeline.truth.replay import (
    ProgressRecords,
    ShardReplay,
    build_models,
    published_catalogue,
    published_settings,
)
from ray_pipeline.truth.windows import Cut, ExpectedWindows, WindowId
from ray_pipeline.windows.spec import WindowSpec, window_specs

__all__ = ["Oracle", "Settled", "expected_key", "published_windows"]

_REACH_MS = 5_000
"""How long the shards' progress may lag behind what the job says it has read, before the job's word is doubted."""
_PUBLISH_MS = 1_000
_WATCHED_MS = 60_000
_FINAL_KEPT = 500
_LONGEST_S = 1e12


def expected_key(record: Mapping[str, Any]) -> str:
    """Key of a window's record in topic ``metrics.expected``."""
    return f"{record['window_type']}|{record['window_start']}"


def published_windows(settings: Settings, record: Any) -> Settings:
    """One's own settings, with the windows that a job published as record ``windows`` of topic ``ratings.progress``.

    Raises:
        RecordError: it is no such record.
    """
    try:
        if not isinstance(record, dict):
            msg = "it is no JSON object"
            raise ValueError(msg)
        said: dict[str, float] = {
            name: _length(record, name) for name in ("tumbling_s", "sliding_s", "slide_s", "top_n")
        }
        for name in ("metrics_topic", "batches_topic"):
            if name in record:
                text_in(record, name)
        said["watermark_s"] = number_in(record, "watermark_s", _LONGEST_S)
        # a job from before there was a guard has none
        said["max_ahead_s"] = number_in(record, "max_ahead_s", _LONGEST_S) if "max_ahead_s" in record else 0.0
        if said["sliding_s"] % said["slide_s"]:
            msg = "sliding_s is not a multiple of slide_s"
            raise ValueError(msg)
    except ValueError as error:
        raise RecordError(
            problem=f"it does not say what windows a job makes: {error}",
            fix="Write the true one again: the job does when it starts",
        ) from error
    return settings.model_copy(update={**said, "start_time_ms": None})  # the job has said how far ahead times may be


def _length(record: Mapping[str, Any], name: str) -> int:
    """Of a window, or of its list of movies: as the settings may have it."""
    most = next(int(limit.le) for limit in Settings.model_fields[name].metadata if hasattr(limit, "le"))
    found = whole_in(record, name, most)
    if not found:
        msg = f"{name} is 0"
        raise ValueError(msg)
    return found


@dataclass(frozen=True, slots=True)
class Settled:
    """What predecessors of an oracle have published that can change no more.

    Attributes:
        query_ms: the newest query of which they made a window final, as their records say; -1 = none. What the queries before it
            made was published before that.
        until_ms: by window type, up to which end its windows are settled in that query, epoch milliseconds.
    """

    query_ms: int = -1
    until_ms: Mapping[str, int] = field(default_factory=dict)


class Oracle:
    """Turns what shards and job publish into what each window must hold. Pure: a shell feeds it and publishes what it says.

    Args:
        settings: one's own; events, movies and windows are taken from what the run published.
        settled: what need not be made again; None = nothing.
        outside: the ratings from outside, kept up by the shell; None = there are none.
    """

    def __init__(
        self, settings: Settings, settled: Settled | None = None, outside: OutsideRatings | None = None
    ) -> None:
        self.settings = settings
        self._catalogue: Catalogue | None = None
        self._settled = settled or Settled()
        self._run: dict[str, Any] | None = None
        self._records: ProgressRecords | None = None
        self._windows: dict[str, Any] | None = None
        self._progress: dict[int, ShardProgress] = {}
        self._replays: dict[int, ShardReplay] = {}
        self._engine: ExpectedWindows | None = None
        self._cuts: deque[Cut] = deque()
        self._last: Cut | None = None
        self._query_ms = -1
        self._outside = outside or OutsideRatings()
        self._waiting_since_ms: int | None = None
        self._published_ms = 0
        self._final: dict[WindowId, dict[str, Any]] = {}
        self._moved_ms: dict[WindowId, int] = {}
        self._changed: set[WindowId] = set()

    # -- records in

    def progress(self, key: str, record: Any) -> None:
        """A record of topic ``ratings.progress``, read from JSON.

        Raises:
            RecordError: nobody of the run can have written it; it changes nothing.
            StateMismatchError: the run's catalogue is not the one at hand.
            CatalogueError: the catalogue at hand cannot be read.
        """
        if key == "run":
            self._catalogue = published_catalogue(self.settings, record)
            self.settings = published_settings(self.settings, record, self._catalogue)
            self._run = record
            self._records = known = ProgressRecords(self.settings, record)
            self._progress = {p: shard for p, shard in self._progress.items() if not known.untrue(shard)}
        elif key == "windows":
            self.settings = published_windows(self.settings, record)
            self._windows = record
        elif key.startswith("shard/"):
            # which run it must be of is known when that one's record has come
            shard = self._records.read(key, record) if self._records else ShardProgress.from_record(record)
            self._progress[shard.partition] = shard
            if shard.partition in self._replays:
                self._replays[shard.partition].update(shard)

    def cut(self, record: Any) -> None:
        """A record of topic ``metrics.batches``, read from JSON; the ratings from outside that it may have read must be known.

        Raises:
            RecordError: it is none; it changes nothing.
        """
        cut = Cut.from_record(record, self._outside)
        if cut.windows is not None:
            published_windows(self.settings, cut.windows)
        self._cuts.append(cut)

    # -- records out

    @property
    def batch(self) -> int:
        """The micro-batch up to which the windows are known; -1 before the first."""
        return self._engine.batch if self._engine else -1

    @property
    def behind(self) -> int:
        """Micro-batches that wait."""
        return len(self._cuts)

    def step(self, now_ms: int, most: int = 50) -> list[dict[str, Any]]:
        """Work off what has come in, at most ``most`` micro-batches.

        Args:
            now_ms: wall clock, epoch milliseconds.
            most: bounds the length of one call.

        Returns:
            Records of topic ``metrics.expected``, in an order in which a successor that reads a part of them can go on.
        """
        if self._run is None or self._windows is None:
            return []
        records: list[dict[str, Any]] = []
        for _ in range(most):
            if not self._cuts or not self._reaches(self._cuts[0], now_ms):
                break
            records += self._advance(self._cuts.popleft(), now_ms)
        if now_ms - self._published_ms >= _PUBLISH_MS:
            self._published_ms = now_ms
            records += self._refreshed(now_ms)
            records += self._open_ones(now_ms)
        return records

    # -- inside

    def _reaches(self, cut: Cut, now_ms: int) -> bool:
        """Whether the shards say that they have sent what the job says it has read; or have not said so for too long."""
        self._replay([p for p, n in cut.read.items() if n and p in self._progress])
        ahead = any(n > self._sent(p) for p, n in cut.in_records(self._replays).read.items())
        if not ahead:
            self._waiting_since_ms = None
            return True
        if self._waiting_since_ms is None:
            self._waiting_since_ms = now_ms
        return now_ms - self._waiting_since_ms > _REACH_MS

    def _sent(self, partition: int) -> int:
        known = self._progress.get(partition)
        return known.next_index if known else 0

    def _advance(self, cut: Cut, now_ms: int) -> list[dict[str, Any]]:
        last, records = self._last, []
        if last is not None and cut.again(last):
            another = self._engine is not None and cut.top_n is not None and self._engine.ran_again(cut.top_n)
            return self._closed(now_ms) if another else []
        if last is None or cut.anew(last):
            records = self._begin(cut, now_ms)
        self._last, engine = cut, self._engine
        if engine is None:  # of a query before the one that predecessors were at
            return records
        cut = cut.in_records(self._replays)
        # more than was sent is not ours: it shows as a difference, and where from is another question
        reached = replace(cut, read={p: min(n, self._sent(p)) for p, n in cut.read.items()})
        self._replay([p for p, n in reached.read.items() if n])
        engine.advance(reached, self._replays)
        return records + self._closed(now_ms)

    def _closed(self, now_ms: int) -> list[dict[str, Any]]:
        """Windows that are final with the micro-batch that has just been taken in."""
        engine, records = self._engine, []
        assert engine is not None
        self._changed.update(engine.changed())
        for window, record in sorted(engine.close(), key=lambda closed: (closed[0][1], closed[0][0])):
            self._moved_ms[window] = engine.watermark.moved_ms
            self._final[window] = self._finished(window, {**record, "final": True, "final_ms": now_ms}, now_ms)
            self._changed.discard(window)
            records.append(dict(self._final[window]))
        while len(self._final) > _FINAL_KEPT:
            oldest = min(self._final, key=lambda key: key[1])
            del self._final[oldest], self._moved_ms[oldest]
        return records

    def _replay(self, partitions: list[int]) -> None:
        """Have the shards of some partitions at hand; all that are missing are made at once, for they share users and movies."""
        missing = [p for p in partitions if p not in self._replays]
        if missing:
            assert self._catalogue is not None
            for partition, model in build_models(self.settings, self._catalogue, missing).items():
                self._replays[partition] = ShardReplay(model, self._progress[partition], self.settings.guard_ms)

    def _begin(self, cut: Cut, now_ms: int) -> list[dict[str, Any]]:
        """A query begins with this cut; returns what the one before has left."""
        # in order, whatever the job's clock says: and the same whenever the topic is read
        before, query_ms = self._engine, max(cut.at_ms, self._query_ms + 1)
        if query_ms < self._settled.query_ms:
            self._query_ms = query_ms
            return []
        self._engine = engine = self._new_engine(cut, query_ms)
        left = [] if before is None else self._left_by(before, engine, now_ms)
        self._query_ms = query_ms
        self._final.clear()
        self._moved_ms.clear()
        self._changed.clear()
        return left

    def _new_engine(self, cut: Cut, query_ms: int) -> ExpectedWindows:
        """For the windows that the query of a cut makes, its first one."""
        assert self._catalogue is not None
        settings = self.settings if cut.windows is None else published_windows(self.settings, cut.windows)
        specs = window_specs(settings)
        settled = self._settled.until_ms if query_ms == self._settled.query_ms else {}
        from_ms = min(settled.get(spec.name, 0) for spec in specs)
        return ExpectedWindows(
            *(self._catalogue, specs, round(settings.watermark_s * 1000), settings.top_n, from_ms, self._outside)
        )

    def _left_by(self, before: ExpectedWindows, engine: ExpectedWindows, now_ms: int) -> list[dict[str, Any]]:
        """Windows of kinds that only the query before made: nothing comes to them any more, so they are final as they are."""
        kept = {spec.name for spec in engine.specs}
        left = [{**before.record(window), "final_ms": now_ms} for window in before.open]
        left += [record for record in self._final.values() if record["unread"]]
        whole = {"final": True, "unread": 0, "unread_partitions": {}, "cut": before.batch, "updated_ms": now_ms}
        whole["query_ms"] = self._query_ms
        return [{**record, **whole} for record in left if record["window_type"] not in kept]

    def _open_ones(self, now_ms: int) -> list[dict[str, Any]]:
        """The open windows that changed."""
        if self._engine is None:
            return []
        still_open = set(self._engine.open)
        found = [
            self._finished(window, {**self._engine.record(window), "final": False, "final_ms": None}, now_ms)
            for window in sorted(self._changed & still_open)
        ]
        self._changed &= self._final.keys()  # what is neither open nor remembered can change no more
        return found

    def _refreshed(self, now_ms: int) -> list[dict[str, Any]]:
        """Final windows of which something was left out, or read, since."""
        if self._engine is None:
            return []
        found = []
        for window, record in self._final.items():
            if now_ms - record["final_ms"] > _WATCHED_MS and not record["unread"] and window not in self._changed:
                continue
            late = self._engine.late.get(window, record["late"])
            unread = self._unread(window)
            self._changed.discard(window)
            if late != record["late"] or unread != record["unread_partitions"]:
                record.update(
                    late=late, unread=sum(unread.values()), unread_partitions=unread, updated_ms=now_ms, cut=self.batch
                )
                found.append(dict(record))
        return found

    def _finished(self, window: WindowId, record: dict[str, Any], now_ms: int) -> dict[str, Any]:
        unread = self._unread(window) if record["final"] else {}
        return {
            **record,
            "unread": sum(unread.values()),
            "unread_partitions": unread,
            "cut": self.batch,
            "query_ms": self._query_ms,
            "updated_ms": now_ms,
        }

    def _unread(self, window: WindowId) -> dict[str, int]:
        """Ratings of a window that were sent and that the job has not read, by partition."""
        assert self._engine is not None
        spec: WindowSpec = self._engine.specs[window[0]]
        found = {}
        ahead = sorted(p for p, progress in self._progress.items() if progress.next_index > self._engine.read.get(p, 0))
        self._replay(ahead)
        for partition in ahead:
            replay, read = self._replays[partition], self._engine.read.get(partition, 0)
            if replay.valid is not None:
                span = (window[1] - spec.size_ms, window[1])
                late = replay.unread(read, replay.progress.next_index, *span, self._moved_ms[window])
                found.update({str(partition): late} if late else {})
                continue
            until = min(replay.progress.next_index, replay.count_before(window[1]))
            first = max(read, replay.count_before(window[1] - spec.size_ms))
            if until > first:
                found[str(partition)] = until - first
        return found
