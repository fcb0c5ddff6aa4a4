"""The newest state of every window, shard and stage: records in, answers out. Bounded, and safe to ask from any thread."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.metrics.curve import DeliveredCurve, planned
from ray_pipeline.metrics.expected import ReadCheck, check_of, due_times, surplus
from ray_pipeline.metrics.health import Evidence, Health, assess
from ray_pipeline.metrics.latency import LatencyMeter
from ray_pipeline.metrics.rate import RateMeter
from ray_pipeline.metrics.records import UnreadableRecord, read_expected, read_oracle, read_window, window_of
from ray_pipeline.metrics.verdicts import Tally, Verdicts
from ray_pipeline.truth.outside import OutsideRatings
from ray_pipeline.windows.spec import epoch_ms, iso_ms

__all__ = ["MetricsStore"]

_TOTALS_KEPT = 10_000
_DETAILS_KEPT = 200
_REJECTS_KEPT = 50
_SCORES_KEPT = 1_000
_LIVE_MS = 2_000


class _Newest:
    """Records of windows by their starts, epoch milliseconds; the newest so many.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self.starts: list[int] = []  # ascending
        self._most = most
        self._records: dict[int, dict[str, Any]] = {}
        self._ends: dict[int, int] = {}

    def get(self, start_ms: int) -> dict[str, Any] | None:
        return self._records.get(start_ms)

    def put(self, start_ms: int, record: dict[str, Any]) -> None:
        if start_ms not in self._records:
            insort(self.starts, start_ms)
        self._records[start_ms] = record
        self._ends[start_ms] = epoch_ms(record["window_end"])
        if len(self.starts) > self._most:
            self.remove(self.starts[0])

    def remove(self, start_ms: int) -> None:
        if self._records.pop(start_ms, None) is not None:
            del self.starts[bisect_left(self.starts, start_ms)], self._ends[start_ms]

    def around_newest(self) -> int | None:
        """Start of the first of the windows that hold the newest one's start; None without any."""
        newest = found = self.starts[-1] if self.starts else None
        for start_ms in reversed(self.starts):
            if newest is None or self._ends[start_ms] <= newest:
                break
            found = start_ms
        return found


@dataclass
class _Windows:
    """Windows of one type."""

    total: _Newest = field(default_factory=lambda: _Newest(_TOTALS_KEPT))
    topn: _Newest = field(default_factory=lambda: _Newest(_DETAILS_KEPT))
    genres: _Newest = field(default_factory=lambda: _Newest(_DETAILS_KEPT))


class MetricsStore:
    """Takes the records of the topics in; values are absolute, so a record that comes twice changes nothing.

    All are of one stream. When another one begins in the same topics, after they were cleared, what was known is forgotten.

    Args:
        window_types: names of the window types, the main one first.
    """

    def __init__(self, window_types: tuple[str, ...]) -> None:
        self.window_types = window_types
        self.kafka_connected = False
        self.version = 0
        self._lock = threading.RLock()
        self._begin()

    def _begin(self) -> None:
        """Know nothing of a stream."""
        self._windows: dict[str, _Windows] = {name: _Windows() for name in self.window_types}
        self._generator: dict[str, Any] = {}
        self._job: dict[str, Any] = {}
        self._sent: dict[int, int] = {}
        self._progress: dict[int, dict[str, Any]] = {}
        self._outside = OutsideRatings()
        self._plain: dict[int, dict[str, Any]] = {}
        self._surplus: dict[int, int] = {}
        self._run: dict[str, Any] = {}
        self._guard_ms = 0
        self._checks: dict[int, ReadCheck | None] = {}
        self._first: dict[int, int] = {}
        self._rated_ms = 0
        self._rate = RateMeter()
        self._delivered = DeliveredCurve()
        self._latency = LatencyMeter()
        self._verdicts = Verdicts()
        self._oracle: dict[str, Any] = {}
        self._rejects: dict[tuple[int, int], dict[str, Any]] = {}
        self._scores: dict[str, dict[str, Any]] = {}
        self._disagreeing_since_ms: int | None = None
        self._alone_since_ms: int | None = None
        self._last_window_ms: int | None = None

    # -- records in

    def take_window(self, key: str, value: bytes | None) -> None:
        """What topic ``metrics`` has under a key from now on; one that cannot be read is no less wrong than one that differs.

        Raises:
            UnreadableRecord: it is no record of a window; that is kept.
        """
        if value is None:
            self.no_window(key)
            return
        try:
            self.window(read_window(key, value))
        except UnreadableRecord as error:
            self.no_window(key, str(error))
            raise

    def take_expected(self, key: str, value: bytes | None, now_ms: int) -> None:
        """The same of topic ``metrics.expected``.

        Raises:
            UnreadableRecord: it is not what a window must hold, nor the oracle's own record; that is kept.
        """
        if key == "oracle":
            if value is not None:
                self.expected(key, read_oracle(value), now_ms)
            return
        if value is None:
            self.no_expected(key)
            return
        try:
            self.expected(key, read_expected(key, value), now_ms)
        except UnreadableRecord as error:
            self.no_expected(key, str(error))
            raise

    def window(self, record: dict[str, Any]) -> None:
        """A record of topic ``metrics``."""
        with self._lock:
            windows = self._windows.setdefault(record["window_type"], _Windows())
            newest: _Newest = getattr(windows, record["kind"])
            newest.put(epoch_ms(record["window_start"]), record)
            self._last_window_ms = max(self._last_window_ms or 0, int(record["updated_ms"]))
            self._verdicts.actual(record)
            self.version += 1

    def no_window(self, key: str, reason: str = "") -> None:
        """Under a key of topic ``metrics`` is no record of a window: it was deleted, or, with a reason, is another thing."""
        with self._lock:
            (window_type, start_ms), kind = window_of(key)
            if kind and window_type in self._windows:
                getattr(self._windows[window_type], kind).remove(start_ms)
            self._verdicts.no_actual(key, reason)
            self.version += 1

    def expected(self, key: str, record: dict[str, Any], now_ms: int) -> None:
        """A record of topic ``metrics.expected``."""
        with self._lock:
            if key == "oracle":
                self._oracle = record
                self._verdicts.oracle_at(int(record["batch"]), now_ms)
            else:
                self._verdicts.expect(record)
            self.version += 1

    def no_expected(self, key: str, reason: str = "") -> None:
        """The same of a key of topic ``metrics.expected``: what the window must hold is not known."""
        with self._lock:
            self._verdicts.no_expected(key, reason)
            self.version += 1

    def progress(self, key: str, record: dict[str, Any], now_ms: int) -> bool:
        """A record of topic ``ratings.progress``.

        Returns:
            Whether another stream begins with it. What was known is forgotten then, also what may be of the new one already: topics are
            read in any order, so all must be read again from their beginning.
        """
        another = False
        with self._lock:
            if key.startswith("shard/"):
                partition, sent = int(record["partition"]), int(record["next_index"])
                # when it was committed, not when it was read here: a feed that begins reads an hour in a moment
                self._rated_ms = max(self._rated_ms, int(record["committed_ms"]))
                self._sent[partition] = sent
                self._progress[partition] = record
                self._first.setdefault(partition, sent)  # what was there before is no rate
                grown = sum(self._sent.values()) - sum(self._first.values())
                self._rate.add(self._rated_ms, grown, now_ms)
                self._delivered.add(self._rated_ms, grown)
            elif key == "generator":
                self._generator = record
                self._note_alone()
            elif key == "run":
                check_of(record["settings"], self._guard_ms, 0)  # raises where no shard could be made of them
                # a start that goes on with a stream keeps its identity
                another = bool(self._run) and self._run.get("run") != record.get("run")
                if another:
                    self._begin()
                self._run = record
                self._checks.clear()
            elif key == "windows":
                self._guard_ms = round(record.get("max_ahead_s", 0.0) * 1000)
                self._checks.clear()
            self._compare(now_ms)
            self.version += 1
            return another

    def job(self, record: dict[str, Any], now_ms: int) -> None:
        """A record of topic ``metrics.progress``."""
        with self._lock:
            fresh = record.get("batch", -1) != self._job.get("batch", -1)
            self._job = record
            self._note_alone()
            self._verdicts.job_at(int(record.get("batch", -1)), record.get("watermark_ms"), now_ms)
            if fresh:
                offset_ms = int(self._generator.get("clock_offset_ms", 0))
                # not when a feed that begins reads older records, nor while the past is made
                live = now_ms - int(record["updated_ms"]) < _LIVE_MS and self._generator.get("state") != "backfilling"
                self._latency.add(self._own(record.get("partitions", {})), now_ms, offset_ms, live, self._due_times)
            self._compare(now_ms)
            self.version += 1

    def reject(self, record: dict[str, Any]) -> None:
        """A record of topic ``ratings.rejected``."""
        with self._lock:
            # by where it is: a micro-batch that is worked out again names the same ones again
            self._rejects[int(record["partition"]), int(record["offset"])] = record
            while len(self._rejects) > _REJECTS_KEPT:
                del self._rejects[next(iter(self._rejects))]
            self.version += 1

    def posted(self, record: dict[str, Any], now_ms: int) -> None:
        """A record of topic ``ratings.outside``."""
        with self._lock:
            self._outside.add(record)
            self._compare(now_ms)
            self.version += 1

    def score(self, key: str, record: dict[str, Any]) -> None:
        """A record of topic ``predictions.scores``: a model's score, or with an empty key the totals and how the feed stands."""
        with self._lock:
            self._scores[key] = record
            while len(self._scores) > _SCORES_KEPT:
                del self._scores[next(iter(self._scores))]
            self.version += 1

    # -- answers out

    def health(self, now_ms: int) -> Health:
        """Whether all is well."""
        with self._lock:
            return assess(
                Evidence(
                    self.kafka_connected,
                    self._generator,
                    self._job,
                    self._surplus,
                    self._disagreeing_since_ms,
                    self._rate.rate(now_ms),
                    now_ms,
                    self._oracle,
                    self._verdicts.tally(now_ms),
                    self._scores.get("", {}),
                    self._alone_since_ms,
                )
            )

    def last_update(self) -> str | None:
        """When a window last changed, ISO-8601; None before the first."""
        return None if self._last_window_ms is None else iso_ms(self._last_window_ms)

    def current(self, window_type: str) -> int | None:
        """Start of the current window: of those that hold the newest rating, the most complete; None without data."""
        with self._lock:
            # of a sliding type the newest has only just begun: the current one ends first of those around its start
            return self._windows[window_type].total.around_newest()

    def summary(self, now_ms: int) -> dict[str, Any]:
        """Every window type's current window, and how the stages stand."""
        with self._lock:
            windows = {name: self._current_total(name, now_ms) for name in self._windows}
            return {
                "status": "ok" if any(windows.values()) else "no data yet",
                "last_update": self.last_update(),
                "windows": windows,
                "generator": self.generator(now_ms),
                "job": self.job_status(now_ms),
                "latency_ms": self.latency_ms(now_ms),
                "verification": self.verification(now_ms),
            }

    def summary_with_health(self, now_ms: int) -> dict[str, Any]:
        """What :meth:`summary` says, and ``health``: ``status``, ``reasons``, ``stale_since`` (ISO-8601, None while all is fresh)."""
        with self._lock:
            found = self.health(now_ms)
            stale_since = None if found.stale_since_ms is None else iso_ms(found.stale_since_ms)
            health = {"status": found.status, "reasons": list(found.reasons), "stale_since": stale_since}
            return {**self.summary(now_ms), "health": health}

    def tally(self, now_ms: int) -> Tally:
        """How many windows have which verdict."""
        with self._lock:
            return self._verdicts.tally(now_ms)

    def windows(self, now_ms: int) -> dict[str, Any]:
        """How many windows have which verdict, and the first wrong ones: expected, actual, difference, reason."""
        with self._lock:
            tally: Tally = self._verdicts.tally(now_ms)
            return {
                "verified": tally.verified,
                "pending": tally.pending,
                "late_by_design": tally.late,
                "wrong": tally.wrong,
                "overdue": tally.overdue,
                "first_wrong": tally.first_wrong,
                "first_overdue": tally.first_overdue,
                "wrong_windows": self._verdicts.wrong(now_ms),
            }

    def verification(self, now_ms: int) -> dict[str, Any]:
        """What :meth:`windows` says, and how far the oracle is."""
        with self._lock:
            return {
                **self.windows(now_ms),
                "oracle": self._oracle,
                "outside": sum(self._outside.counts().values()),
            }

    def outside(self) -> dict[str, int]:
        """How many ratings from outside there are, by partition."""
        with self._lock:
            return {str(p): n for p, n in self._outside.counts().items()}

    def generator(self, now_ms: int) -> dict[str, Any]:
        """The generator's record, with what was measured here: delivered rate, ratings of the last minute, all delivered."""
        with self._lock:
            return {
                **self._generator,
                "delivered_rate": round(self._rate.rate(now_ms), 3),
                "delivered_last_minute": self._rate.last_minute(now_ms),
                "delivered_total": sum(self._sent.values()),
                "partitions": {str(p): n for p, n in sorted(self._sent.items())},
            }

    def plan(self, now_ms: int, typed: str | None = None) -> dict[str, Any]:
        """The plan's text, and its rate from five minutes ago to ten minutes ahead beside the rate delivered.

        Args:
            now_ms: wall-clock time, epoch milliseconds.
            typed: a plan that might be set; None = none.

        Returns:
            ``plan``: the text, None where the rate is constant; ``planned``, ``delivered``, ``typed``: pairs of event time
            (epoch milliseconds) and ratings per second. None is delivered on time while the past is made.

        Raises:
            PlanError: ``typed`` is malformed.
        """
        with self._lock:
            generator, delivered = self._generator, self._delivered.points()
        offset_ms = int(generator.get("clock_offset_ms", 0))
        live = generator.get("state") != "backfilling"
        return {
            "plan": generator.get("plan"),
            "planned": planned(generator, now_ms),
            "delivered": [(at_ms + offset_ms, rate) for at_ms, rate in delivered] if live else [],
            "typed": [] if typed is None else planned(generator, now_ms, typed),
        }

    def run(self) -> dict[str, Any]:
        """The record ``run``: identity and event settings of the run; empty before there is one."""
        with self._lock:
            return self._run

    def job_status(self, now_ms: int) -> dict[str, Any]:
        """The job's record without its ledger; with the age of its watermark."""
        with self._lock:
            said = {name: value for name, value in self._job.items() if name != "ledger"}
            watermark_ms, newest = said.get("watermark_ms"), self._newest_event_ms()
            said["watermark_delay_ms"] = newest - watermark_ms if watermark_ms and newest else None
            return said

    def latency_ms(self, now_ms: int) -> dict[str, float] | None:
        """Rating created → window readable here, p50 and p95 of the last 30 s; None without data."""
        with self._lock:
            found = self._latency.percentiles(now_ms, (0.5, 0.95, 0.99))
            if found is None:
                return None
            return {name: round(ms, 1) for name, ms in zip(("p50", "p95", "p99"), found, strict=True)}

    def topn(self, window_type: str, start_ms: int | None = None) -> dict[str, Any] | None:
        """The ``topn`` record of a window, the current one by default; None without data."""
        return self._detail("topn", window_type, start_ms)

    def genres(self, window_type: str, start_ms: int | None = None) -> dict[str, Any] | None:
        """The ``genres`` record of a window, the current one by default; None without data."""
        return self._detail("genres", window_type, start_ms)

    def history(
        self,
        window_type: str,
        from_ms: int | None = None,
        to_ms: int | None = None,
        limit: int = _TOTALS_KEPT,
        now_ms: int | None = None,
    ) -> list[dict[str, Any]]:
        """The last ``limit`` windows that start in ``[from_ms, to_ms)``, oldest first, up to the current one.

        With their verdicts when ``now_ms`` (wall clock, epoch milliseconds) is given.
        """
        with self._lock:
            current = self.current(window_type)
            if current is None:
                return []
            total = self._windows[window_type].total
            until = bisect_right(total.starts, current if to_ms is None else min(current, to_ms - 1))
            first = 0 if from_ms is None else bisect_left(total.starts, from_ms)
            records = [total.get(start_ms) for start_ms in total.starts[max(first, until - limit) : until]]
            found = [self._with_final(record) for record in records if record is not None]
            return found if now_ms is None else [self._with_verdict(record, now_ms) for record in found]

    def rejects(self) -> list[dict[str, Any]]:
        """The last records that were no valid rating, newest first."""
        with self._lock:
            return list(reversed(self._rejects.values()))

    def scores(self) -> dict[str, Any]:
        """``models``: each model's score, the best first; ``records``, ``rejected``: what came in over all.

        ``state``, ``reason``: how the feed stands that writes them, such as ``failed`` and why; None where it has not said so.
        """
        with self._lock:
            totals = self._scores.get("", {})
            models = [record for key, record in self._scores.items() if key]
        return {
            "models": sorted(models, key=_rank),
            "records": totals.get("records", 0),
            "rejected": totals.get("rejected", {}),
            "state": totals.get("state"),
            "reason": totals.get("reason"),
        }

    # -- inside

    def _detail(self, kind: str, window_type: str, start_ms: int | None) -> dict[str, Any] | None:
        with self._lock:
            at = self.current(window_type) if start_ms is None else start_ms
            newest: _Newest = getattr(self._windows[window_type], kind)
            record = None if at is None else newest.get(at)
            return None if record is None else self._with_final(record)

    def _current_total(self, window_type: str, now_ms: int) -> dict[str, Any] | None:
        record = self._detail("total", window_type, None)
        return None if record is None else self._with_verdict(record, now_ms)

    def _with_verdict(self, record: dict[str, Any], now_ms: int) -> dict[str, Any]:
        return {**record, **self._verdicts.of(record["window_type"], epoch_ms(record["window_start"]), now_ms)}

    def _with_final(self, record: dict[str, Any]) -> dict[str, Any]:
        """With ``final``: whether the watermark has passed the window's end, so that it cannot change any more."""
        watermark_ms = self._job.get("watermark_ms")
        return {**record, "final": bool(watermark_ms and epoch_ms(record["window_end"]) <= watermark_ms)}

    def _newest_event_ms(self) -> int | None:
        times = [int(p["max_event_ms"]) for p in self._job.get("partitions", {}).values()]
        newest = max(times, default=-1)
        return newest if newest >= 0 else None

    def _compare(self, now_ms: int) -> None:
        """Compare what the job has read of each partition with what it must have read by then."""
        if int(self._job.get("batch", -1)) < 0:
            return
        for name, newest in self._job.get("partitions", {}).items():
            partition = int(name)
            said = self._telling(partition, newest)
            found = 0 if said is None else self._surplus_of(partition, said)
            if found is not None:  # else the progress record that tells is still to come
                self._surplus.pop(partition, None)
                if found:
                    self._surplus[partition] = found
        if not self._surplus:
            self._disagreeing_since_ms = None
        elif self._disagreeing_since_ms is None:
            self._disagreeing_since_ms = now_ms

    def _check(self, partition: int) -> Callable[[dict[str, Any], int, int], int | None] | None:
        """How to compare a shard whose records are broken on purpose; None where none are."""
        if not self._run:
            return None
        if partition not in self._checks:
            self._checks[partition] = check_of(self._run["settings"], self._guard_ms, partition)
        check = self._checks[partition]
        return None if check is None else check.surplus

    def _own(self, partitions: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What was read, with the records of the shards alone."""
        return {
            name: {**said, "records": int(said["records"]) - self._outside.before(int(name), int(said["next_offset"]))}
            for name, said in partitions.items()
        }

    def _due_times(self, name: str, indexes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Event times at which ratings of a shard were due: of those that it has said to have sent. None where it has said nothing."""
        progress = self._progress.get(int(name))
        return None if progress is None else due_times(progress, indexes[indexes < int(progress["next_index"])])

    def _note_alone(self) -> None:
        """Note since when the generator goes on though the job has stopped. A generator that starts waits for the job."""
        state = self._generator.get("state", "stopped")
        if self._job.get("state") != "stopped" or state in ("starting", "stopping", "stopped", "failed"):
            self._alone_since_ms = None
        elif self._alone_since_ms is None:
            self._alone_since_ms = max(int(self._job["updated_ms"]), int(self._generator["updated_ms"]))

    def _telling(self, partition: int, newest: dict[str, Any]) -> dict[str, Any] | None:
        """The last totals of a partition that can be compared with the shard's plan; None when there are none.

        While the newest rating of all is one from outside, the totals do not say how far the shard's own have been read.
        """
        for said in (newest, self._plain.pop(partition, None)):
            if said is None:
                continue
            outside_ms = self._outside.newest_ms(partition, int(said["next_offset"]))
            if outside_ms < 0 or outside_ms < int(said["max_event_ms"]):
                self._plain[partition] = said
                return said
        return None

    def _surplus_of(self, partition: int, said: dict[str, Any]) -> int | None:
        """By how much what the job has read of a shard's own ratings differs from what it must have read by then."""
        own = int(said["records"]) - self._outside.before(partition, int(said["next_offset"]))
        progress = self._progress.get(partition)
        if progress is None:
            return own  # nobody has said that they sent anything
        return (self._check(partition) or surplus)(progress, own, int(said["max_event_ms"]))


def _rank(score: dict[str, Any]) -> tuple[bool, float, str]:
    """Sorts scores by their error against the truth, which does not reward luck; those that matched no rating last."""
    return score["matched"] == 0, score["truth"]["rmse"] or 0.0, score["model"]
