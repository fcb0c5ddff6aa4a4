"""The answer key's feed: topic ``ratings`` in, topic ``ratings.truth`` out, where data is broken on purpose.

Each case has a key of its own, so that one which is written again after a failure changes nothing. How far the key reaches is written
behind the cases, as ``reached/<partition>``; a successor goes on there.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from confluent_kafka import KafkaException

from ray_pipeline.clock import Clock
from ray_pipeline.codec import parse_object, whole_in
from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import BrokerUnavailableError, RayPipelineError, RecordError, UncheckedError
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.read import Record, follow, read_topic
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.labels import labels
from ray_pipeline.restart import Decision, RestartPolicy
from ray_pipeline.truth.answers import AnswerKey, answer_key
from ray_pipeline.truth.oracle import published_windows
from ray_pipeline.truth.replay import ProgressRecords, ShardReplay, build_models
from ray_pipeline.verification.audit import PublishedRun, published_run

__all__ = ["AnswerFeed", "reached_key"]

_log = logging.getLogger(__name__)

_NO_RUN_S = 1.0
_PUBLISH_MS = 1_000
_FLUSH_DEADLINE_S = 30.0
_WAITING_MOST = 200_000


def reached_key(partition: int) -> str:
    """Key of the record that says how far the answer key of a partition reaches: ``{"partition","index","offset"}``."""
    return f"reached/{partition}"


class AnswerFeed:
    """One thread that follows ratings and progress and publishes what is broken; begins again when Kafka was away.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        clock: tells the time.
    """

    def __init__(self, settings: Settings, bootstrap: str, clock: Clock) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._clock = clock
        self._policy = RestartPolicy()
        self._state, self._reason = "starting", ""
        self._published = 0
        self._failed: list[str] = []
        self._finish_by: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        """Begin to follow; returns at once."""
        self._thread.start()

    def stop(self, deadline_s: float = 30.0) -> None:
        """Publish what was sent so far, and end."""
        self._finish_by = time.monotonic() + deadline_s
        if self._thread.is_alive():
            self._thread.join(deadline_s + 1.0)
        self._end.set()

    def status(self) -> dict[str, Any]:
        """``state``: starting, waiting, running, not needed, failed, stopped; ``reason``; cases ``published``."""
        return {"state": self._state, "reason": self._reason, "published": self._published}

    # -- the thread

    def _run(self) -> None:
        while not self._over():
            try:
                if self._session():
                    self._state, self._reason = "stopped", ""
                    return
            except (KafkaException, BrokerUnavailableError, BufferError) as error:
                if self._policy.failed(self._clock.now_ms()) is Decision.GIVE_UP:
                    self._fail(f"it lost Kafka too often: {error}")
                    return
                self._state, self._reason = "waiting", f"Kafka is away: {error}"
                self._clock.wait(self._end, self._policy.backoff_s)
            except RayPipelineError as error:
                self._fail(str(error))
                return
            except Exception as error:  # noqa: BLE001 - the thread's last line: reported, and shown as failed
                _log.exception("the answer key failed")
                self._fail(f"{type(error).__name__}: {error}")
                return

    def _fail(self, reason: str) -> None:
        _log.error("no answer key any more: %s", reason)
        self._state, self._reason = "failed", reason

    def _over(self) -> bool:
        return self._end.is_set() or (self._finish_by is not None and time.monotonic() > self._finish_by)

    def _session(self) -> bool:
        """Follow until told to stop; False to begin anew."""
        try:
            run = published_run(self._settings, self._bootstrap)
        except UncheckedError as error:
            self._state, self._reason = "waiting", error.problem
            self._clock.wait(self._end, _NO_RUN_S)
            return self._finish_by is not None
        settings = run.settings
        models = build_models(settings, load_catalogue(settings), range(settings.partitions))
        if all(model.faults is None for model in models.values()) and not settings.drift and not settings.attack:
            self._state, self._reason = "not needed", "nothing is broken on purpose, drifts or is attacked"
            self._wait_for_the_end()
            return True
        self._state, self._reason = "running", ""
        return _Session(self, run, {p: model for p, model in models.items()}).run()

    def _wait_for_the_end(self) -> None:
        while self._finish_by is None and not self._clock.wait(self._end, 0.5):
            continue


class _Shard:
    """Where the key of one partition is."""

    def __init__(self, index: int, offset: int) -> None:
        self.key: AnswerKey | None = None
        self.replay: ShardReplay | None = None
        self.index = index
        self.offset = offset
        self.marked = -1
        self.waiting: deque[Record] = deque()


def _reached(record: Record, guard_ms: int) -> _Shard:
    """Where a predecessor was with the same guard; the beginning, when it does not say so."""
    said = parse_object(record.value) or {}
    try:
        return (
            _Shard(*(whole_in(said, name) for name in ("index", "offset")))
            if said.get("guard_ms") == guard_ms
            else _Shard(0, 0)
        )
    except ValueError as error:
        _log.warning("%s, offset %d, is passed over: %s", record.topic, record.offset, error)
        return _Shard(0, 0)


class _Session:
    """From one connection to Kafka to the next."""

    def __init__(self, feed: AnswerFeed, run: PublishedRun, models: dict[int, Any]) -> None:
        self._feed = feed
        settings = self._settings = run.settings
        self._records = ProgressRecords(settings, run.run)
        self._models = models
        self._failed: list[str] = []
        self._producer = make_producer(feed._bootstrap, on_delivery=self._delivered)
        self._shards = {p: _Shard(0, 0) for p in models}
        partitions = {reached_key(p): p for p in models}
        for record in read_topic(feed._bootstrap, settings.truth_topic):
            if record.key in partitions:
                self._shards[partitions[record.key]] = _reached(record, settings.guard_ms)
        self._published_ms = 0

    def run(self) -> bool:
        feed, settings = self._feed, self._settings
        starts = {(settings.ratings_topic, p): shard.offset for p, shard in self._shards.items()}
        topics = [settings.progress_topic, settings.ratings_topic]
        end = threading.Event()
        for records in follow(feed._bootstrap, topics, True, end, starts):
            if not self._take(records):
                return False
            now_ms = feed._clock.now_ms()
            if now_ms - self._published_ms >= _PUBLISH_MS:
                self._published_ms = now_ms
                self._mark()
            if feed._over() or (feed._finish_by is not None and not records and self._complete()):
                end.set()
        self._mark()
        return True

    def _take(self, records: Iterable[Record]) -> bool:
        """Take records in; False when the job's guard turns out to be another, so that the key must be made anew."""
        for record in records:
            if record.topic == self._settings.ratings_topic:
                self._shards[record.partition].waiting.append(record)
            elif record.key is not None and not self._told(record.key, record):
                return False
        for shard in self._shards.values():
            self._work(shard)
        return True

    def _told(self, key: str, record: Record) -> bool:
        """Take a record of the progress topic in; False when the job's guard is another."""
        said = parse_object(record.value)
        try:
            if key == "windows":
                return published_windows(self._settings, said).guard_ms == self._settings.guard_ms
            if key.startswith("shard/"):
                self._progress(self._records.read(key, said))
        except RecordError as error:  # somebody else's record must not end the answer key
            _log.warning("%s, offset %d, is passed over: %s", record.topic, record.offset, error.problem)
        return True

    def _progress(self, progress: ShardProgress) -> None:
        shard = self._shards[progress.partition]
        if shard.replay is None or shard.key is None:
            model = self._models[progress.partition]
            shard.replay = ShardReplay(model, progress, self._settings.guard_ms)
            shard.key = AnswerKey(shard.replay, shard.index, labels(self._settings, progress.partition, progress.share))
        elif progress.next_index >= shard.replay.progress.next_index:
            changed = progress.epochs != shard.replay.progress.epochs
            shard.replay.update(progress)
            if changed:
                shard.key.renew()

    def _work(self, shard: _Shard) -> None:
        """What the shard says that it has sent: only of that the times are certain."""
        while shard.key is not None and (count := self._certain(shard)):
            records = [shard.waiting.popleft() for _ in range(count)]
            for case in shard.key.take([r.value for r in records], [r.offset for r in records]):
                self._put(answer_key(case), case)
                self._feed._published += 1
            shard.index, shard.offset = shard.key.index, records[-1].offset + 1

    @staticmethod
    def _certain(shard: _Shard) -> int:
        """How many of the records that wait may be looked at; records of others wait until there are too many of them."""
        sent = shard.replay.progress.next_index if shard.replay else 0
        # what is read first of the shards' progress may be from before the mark that this began at
        return min(len(shard.waiting), max(0, sent - shard.index, len(shard.waiting) - _WAITING_MOST))

    def _complete(self) -> bool:
        return all(s.replay is None or s.index >= s.replay.progress.next_index for s in self._shards.values())

    def _mark(self) -> None:
        """Say how far the key reaches, behind what it holds up to there."""
        self._flush()
        for partition, shard in self._shards.items():
            if shard.key is not None and shard.marked != shard.offset:
                shard.marked = shard.offset
                place = {"partition": partition, "index": shard.index, "offset": shard.offset}
                self._put(reached_key(partition), {**place, "guard_ms": self._settings.guard_ms})
        self._flush()

    def _put(self, key: str, record: dict[str, Any]) -> None:
        data = json.dumps(record, separators=(",", ":")).encode()
        while True:
            try:
                self._producer.produce(self._settings.truth_topic, key=key.encode(), value=data)
                return
            except BufferError:
                self._flush()

    def _flush(self) -> None:
        if self._producer.flush(_FLUSH_DEADLINE_S) or self._failed:
            raise BrokerUnavailableError(problem=f"the answer key could not be published: {self._failed[:1]}")

    def _delivered(self, error: Any, _message: Any) -> None:
        if error is not None:
            self._failed.append(error.str())
