"""The oracle's stage: reads what shards and job publish, and publishes what the windows must hold."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaException

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.codec import parse_object, text_in, whole_in
from ray_pipeline.config import Settings
from ray_pipeline.errors import BrokerUnavailableError, RayPipelineError, RecordError
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.publish import Publisher
from ray_pipeline.kafka.read import Record, follow, read_topic
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.restart import Decision, RestartPolicy
from ray_pipeline.truth.oracle import Oracle, Settled, expected_key
from ray_pipeline.verification.outside import OutsideLedger
from ray_pipeline.windows.spec import epoch_ms

__all__ = ["OracleStage"]

_log = logging.getLogger(__name__)

_FLUSH_DEADLINE_S = 30.0
_STATUS_MS = 1_000
_MOST_WAITING = 1_000


@dataclass(frozen=True, slots=True)
class _Window:
    """What a record of topic ``metrics.expected`` says of whether its window can change."""

    window_type: str
    end_ms: int
    final: bool
    unread: int
    batch: int
    query_ms: int

    @classmethod
    def from_record(cls, said: dict[str, Any]) -> _Window:
        """Of a value, read from JSON; raises ValueError, OverflowError."""
        return cls(
            text_in(said, "window_type"),
            epoch_ms(text_in(said, "window_end")),
            bool(said["final"]),
            whole_in(said, "unread"),
            whole_in(said, "batch"),
            whole_in(said, "query_ms") if "query_ms" in said else -1,  # an earlier version did not say of which query
        )


class OracleStage:
    """Runs an :class:`Oracle` on a thread of its own; begins again where it was when Kafka went away.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        clock: tells the time.
        policy: decides whether to go on after a failure.
    """

    def __init__(
        self, settings: Settings, bootstrap: str, clock: Clock | None = None, policy: RestartPolicy | None = None
    ) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._clock = clock or SystemClock()
        self._policy = policy or RestartPolicy()
        self._oracle: Oracle | None = None
        self._state, self._reason = "starting", ""
        self._restarts = 0
        self._passed_over = 0
        self._status_ms = 0
        self._failed: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="oracle", daemon=True)

    def start(self) -> None:
        """Begin to follow; returns at once."""
        load_catalogue(self._settings)
        self._thread.start()

    def stop(self, deadline_s: float = 30.0) -> None:
        """Work off what is there, and end."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(deadline_s)

    def status(self) -> dict[str, Any]:
        """State, reason, and how far it is; ``passed_over`` counts records that nobody of the run wrote. Returns at once."""
        oracle = self._oracle
        return {
            "state": self._state,
            "reason": self._reason,
            "batch": oracle.batch if oracle else -1,
            "behind": oracle.behind if oracle else 0,
            "restarts": self._restarts,
            "passed_over": self._passed_over,
        }

    # -- the thread

    def _run(self) -> None:
        while True:
            try:
                self._session()
                self._state = "stopped"
                return
            except (KafkaException, BrokerUnavailableError, BufferError) as error:
                _log.warning("the oracle lost Kafka: %s", error)
                self._reason = str(error)
                if self._policy.failed(self._clock.now_ms()) is Decision.GIVE_UP:
                    self._fail(f"it lost Kafka too often: {error}")
                    return
                self._restarts += 1
                if self._clock.wait(self._end, self._policy.backoff_s):
                    self._state = "stopped"
                    return
            except RayPipelineError as error:
                self._fail(str(error))
                return
            except Exception as error:  # noqa: BLE001 - the thread's last line: reported, and shown as failed
                _log.exception("the oracle failed")
                self._fail(f"{type(error).__name__}: {error}")
                return

    def _fail(self, reason: str) -> None:
        """Say so where those look who would rely on it."""
        self._state, self._reason = "failed", reason
        publisher = Publisher(self._bootstrap)
        publisher.put(self._settings.expected_topic, "oracle", {**self.status(), "updated_ms": self._clock.now_ms()})
        publisher.close()

    def _session(self) -> None:
        settings = self._settings
        self._failed.clear()  # of the session before
        settled = self._settled()
        outside = OutsideLedger(settings, self._bootstrap)
        oracle = self._oracle = Oracle(settings, settled, outside.ratings)
        producer = make_producer(self._bootstrap, on_delivery=self._delivered)
        self._state, self._reason, self._passed_over = "running", "", 0
        for records in follow(self._bootstrap, [settings.progress_topic, settings.batches_topic], True, self._end):
            if any(record.topic == settings.batches_topic for record in records):
                outside.refresh()  # before the cuts: all that those micro-batches can have read
            for record in records:
                self._take(oracle, record)
            self._work(oracle, producer)
            while oracle.behind > _MOST_WAITING and self._work(oracle, producer):
                continue  # what waits is bounded: no more is read until it is worked off
        while oracle.behind and self._work(oracle, producer):
            continue
        self._publish(producer, "oracle", {**self.status(), "state": "stopped", "updated_ms": self._clock.now_ms()})
        producer.flush(5.0)
        outside.close()

    def _take(self, oracle: Oracle, record: Record) -> None:
        value = parse_object(record.value)
        try:
            if record.topic == self._settings.batches_topic:
                oracle.cut(value)
            else:
                oracle.progress(record.key or "", value)
        except RecordError as error:  # somebody else's record must not end the verification
            self._passed_over += 1
            self._reason = f"a record of topic {record.topic}, offset {record.offset}, is passed over: {error.problem}"
            _log.warning("%s", self._reason)

    def _work(self, oracle: Oracle, producer: Any) -> bool:
        """One step; whether anything came of it."""
        now_ms, before = self._clock.now_ms(), oracle.behind
        for record in oracle.step(now_ms):
            self._publish(producer, expected_key(record), record)
        if now_ms - self._status_ms >= _STATUS_MS:
            self._status_ms = now_ms
            self._publish(producer, "oracle", {**self.status(), "updated_ms": now_ms})
        producer.poll(0)
        if self._failed:
            raise BrokerUnavailableError(problem=f"expected windows could not be published: {self._failed.pop()}")
        return oracle.behind < before

    def _publish(self, producer: Any, key: str, record: dict[str, Any]) -> None:
        data = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
        try:
            producer.produce(self._settings.expected_topic, key=key.encode(), value=data)
        except BufferError:
            if producer.flush(_FLUSH_DEADLINE_S):
                raise
            producer.produce(self._settings.expected_topic, key=key.encode(), value=data)

    def _delivered(self, error: Any, _message: Any) -> None:
        if error is not None:
            self._failed.append(error.str())

    def _settled(self) -> Settled:
        """What predecessors have published that can change no more."""
        windows: dict[str, _Window] = {}
        for record in read_topic(self._bootstrap, self._settings.expected_topic):
            key, said = record.key or "", parse_object(record.value) or {}
            windows.pop(key, None)
            if not isinstance(said.get("final"), bool):
                continue
            try:
                windows[key] = _Window.from_record(said)
            except (ValueError, OverflowError) as error:  # somebody else's: as if that window had not been published
                _log.warning("%s, offset %d, is passed over: %s", record.topic, record.offset, error)
        query_ms = max((one.query_ms for one in windows.values() if one.final), default=-1)
        newest = [one for one in windows.values() if one.query_ms == query_ms]
        batch = max((one.batch for one in newest if one.final), default=-1)
        found: dict[str, int] = {}
        for one in newest:
            if one.final:  # they are published in order of their ends: the last end may be incomplete
                found[one.window_type] = max(found.get(one.window_type, 0), one.end_ms - 1)
        for one in newest:
            # who makes one of these anew says of it that it is open, until it is final once more; and a job that was killed may run
            # its last micro-batch again, with another top-N
            if not one.final or one.unread or one.batch == batch:
                found[one.window_type] = min(found.get(one.window_type, 0), one.end_ms - 1)
        return Settled(query_ms, found)
