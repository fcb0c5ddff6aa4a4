"""Keeps the store fresh from Kafka; says honestly when Kafka is away."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from confluent_kafka import KafkaException

from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.errors import DeliveryError
from ray_pipeline.formats.factory import open_format
from ray_pipeline.kafka.client import make_admin
from ray_pipeline.kafka.read import LatestRecords, Record, follow
from ray_pipeline.metrics.records import (
    parse,
    read_generator,
    read_job,
    read_score,
)
from ray_pipeline.metrics.store import MetricsStore

__all__ = ["Feed"]

_log = logging.getLogger(__name__)

_PING_S = 2.0
_PING_TIMEOUT_S = 3.0
_RETRY_S = 1.0
_TAIL_FRESH_MS = 1_000
_TAIL = 20
_LONG_TAIL = 100
_TAIL_PARTITIONS = 16


class Feed:
    """Two threads: one follows the topics, one asks the broker whether it is there.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        store: what to keep fresh.
        clock: tells the time.
    """

    def __init__(self, settings: Settings, bootstrap: str, store: MetricsStore, clock: Clock) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._store = store
        self._clock = clock
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._follow, name="feed", daemon=True),
            threading.Thread(target=self._ping, name="feed-ping", daemon=True),
        ]
        self._wire = open_format(settings)
        self._tail_lock = threading.Lock()
        self._latest: LatestRecords | None = None
        self._tail: list[Record] = []
        self._tail_ms = 0
        self._tail_most = 0
        self.malformed = 0

    def start(self) -> None:
        """Begin to follow."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads."""
        self._end.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(10)
        if self._latest is not None:
            self._latest.close()

    def tail(self, count: int) -> list[Record]:
        """The newest records of the first 16 partitions of the ratings topic, newest first; at most 100.

        The broker is asked at most twice a second, however many look: for 20, or for 100 where somebody wants more.
        """
        most = _TAIL if count <= _TAIL else _LONG_TAIL
        with self._tail_lock:
            now_ms = self._clock.now_ms()
            old = now_ms - self._tail_ms >= _TAIL_FRESH_MS or most > self._tail_most
            if old and self._store.kafka_connected:
                try:
                    self._latest = self._latest or LatestRecords(
                        self._bootstrap, self._settings.ratings_topic, _TAIL_PARTITIONS
                    )
                    records = self._latest.read(most)
                    values = self._wire.from_wire([record.value for record in records])
                    self._tail = [replace(r, value=value) for r, value in zip(records, values, strict=True)]
                    self._tail_ms, self._tail_most = now_ms, most
                except (KafkaException, DeliveryError) as error:
                    _log.info("live tail: %s", error)
            return self._tail[::-1][:count]

    # -- the threads

    def _follow(self) -> None:
        settings = self._settings
        topics = [
            settings.progress_topic,
            settings.metrics_topic,
            settings.job_topic,
            settings.expected_topic,
            settings.outside_topic,
            settings.rejected_topic,
            settings.scores_topic,
        ]
        began = -1
        while not self._end.is_set():
            try:
                began = self._follow_stream(topics, began)
            except KafkaException as error:
                began = -1
                _log.warning("the feed lost Kafka and tries again: %s", error)
                self._clock.wait(self._end, _RETRY_S)

    def _follow_stream(self, topics: list[str], began: int) -> int:
        """Take in what the topics have from their beginning on, until the feed ends or another stream begins.

        Args:
            topics: which topics.
            began: offset of the record ``run`` of the stream, where it is known: one before it is a former stream's. -1 = it is not.

        Returns:
            Offset of the record ``run`` of the other stream; -1 without one.
        """
        for records in follow(self._bootstrap, topics, True, self._end):
            for record in records:
                if record.key == "run" and record.topic == self._settings.progress_topic:
                    if record.offset < began:
                        continue
                    began = -1
                if self._take(record):
                    _log.info("another stream has begun: the topics are read from their beginning")
                    return record.offset
        return -1

    def _take(self, record: Record) -> bool:
        """Hand a record to the store; whether another stream begins with it, see :meth:`MetricsStore.progress`."""
        if record.key is None:
            return False
        settings, store, now_ms = self._settings, self._store, self._clock.now_ms()
        try:
            if record.topic == settings.metrics_topic:
                store.take_window(record.key, record.value)
            elif record.topic == settings.expected_topic:
                store.take_expected(record.key, record.value, now_ms)
            elif record.value is None:
                return False
            elif record.topic == settings.job_topic:
                store.job(read_job(record.value), now_ms)
            elif record.topic == settings.progress_topic:
                read = read_generator if record.key == "generator" else parse
                return store.progress(record.key, read(record.value), now_ms)
            elif record.topic == settings.outside_topic:
                store.posted(parse(record.value), now_ms)
            elif record.topic == settings.scores_topic:
                store.score(record.key, read_score(record.key, record.value))
            else:
                store.reject(parse(record.value))
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
        ) as error:  # somebody else's record must not end the feed
            self.malformed += 1
            _log.warning("%s, offset %d, is not understood and passed over: %r", record.topic, record.offset, error)
        return False

    def _ping(self) -> None:
        admin = make_admin(self._bootstrap)
        while not self._end.is_set():
            try:
                admin.list_topics(self._settings.ratings_topic, timeout=_PING_TIMEOUT_S)
                self._store.kafka_connected = True
            except KafkaException as error:
                if self._store.kafka_connected:
                    _log.warning("no Kafka broker answers: %s", error)
                self._store.kafka_connected = False
            self._clock.wait(self._end, _PING_S)
