"""What is done with a micro-batch: collect, publish, keep the rejects. Any failure fails the batch, which then runs again."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from confluent_kafka import KafkaError, KafkaException, Producer

from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.errors import NotAllowedError, ProcessingError
from ray_pipeline.kafka.client import error_of, make_producer
from ray_pipeline.windows.collector import Collector, Groups, PartitionTotals
from ray_pipeline.windows.ledger import CountLedger
from ray_pipeline.windows.spec import WindowSpec, iso_ms

__all__ = ["BatchSink", "to_groups"]

_FLUSH_DEADLINE_S = 60.0
_MOST_OF_A_KEY = 1 << 14
_MOST_OF_A_VALUE = 1 << 16
"""Characters of a rejected record's that are kept, or bytes where it is no text. One may take six bytes in JSON."""


class BatchSink:
    """Takes the changed groups of micro-batches.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        collector: keeps the open windows.
        specs: the window kinds.
        clock: tells the time.
        read_rejects: reads the invalid records among offsets ``first … last`` of a partition.
        job_record: completes the job's record with what only the stage knows.
    """

    def __init__(
        self,
        settings: Settings,
        bootstrap: str,
        collector: Collector,
        specs: tuple[WindowSpec, ...],
        clock: Clock,
        read_rejects: Callable[[int, int, int], list[dict[str, Any]]],
        job_record: Callable[[], dict[str, Any]],
    ) -> None:
        self.ledger = CountLedger()
        self.batch = -1
        self._settings = settings
        self._collector = collector
        self._specs = specs
        self._clock = clock
        self._read_rejects = read_rejects
        self._job_record = job_record
        self._windows_told = False
        self._standing: dict[str, Any] = self._totals()
        self._telling = threading.Lock()
        self._producer: Producer = make_producer(bootstrap, message_timeout_ms=55_000)

    @property
    def watermark_ms(self) -> int:
        """Up to which end windows are final, and published; epoch milliseconds of event time."""
        return self._collector.watermark_ms

    def restore(self, groups: Groups, watermark_ms: int, last_record: dict[str, Any] | None) -> None:
        """Refill from the checkpoint's state after a restart.

        Args:
            groups: all groups of the state.
            watermark_ms: the watermark of the micro-batch that the state is of, epoch milliseconds.
            last_record: the job's last published record.
        """
        self._collector.restore(groups, watermark_ms)
        counts = {end_ms: self._collector.count_of((0, end_ms)) for kind, end_ms in self._collector.open if kind == 0}
        if last_record is not None and "ledger" in last_record:
            self.batch = int(last_record["batch"])
            self.ledger.restore(last_record["ledger"], counts, watermark_ms)
        else:
            for end_ms, count in counts.items():
                self.ledger.set(end_ms, count)
        self._standing = self._totals()

    def __call__(self, frame: Any, batch: int) -> None:
        """Called by Spark with each micro-batch's changed groups."""
        groups, records = to_groups(frame.toArrow()), _Records(self._producer)
        before = dict(self._collector.totals)
        watermark_ms = self._collector.next_watermark_ms()
        changed = self._collector.apply(groups)
        now_ms = self._clock.now_ms()
        for window in changed:
            if window[0] == 0:
                self.ledger.set(window[1], self._collector.count_of(window))
            for key, record in self._collector.records(window, batch, now_ms):
                records.put(self._settings.metrics_topic, key, record)
        self._publish_rejects(before, records)
        records.flush()
        # after the windows: who knows what a micro-batch read can be sure that what it made of it is there
        records.put(self._settings.batches_topic, str(batch), self._cut(batch, watermark_ms))
        self._windows_told = True
        self._collector.close(watermark_ms)
        self.ledger.close(watermark_ms)
        self.batch = batch
        self._standing = self._totals()
        self.publish_job()  # last, so that who reads it can be sure that the windows are there
        records.flush()

    def publish_windows(self) -> None:
        """Publish what the windows are, for those who check them."""
        records = _Records(self._producer)
        records.put(self._settings.progress_topic, "windows", self._windows())
        records.flush()

    def publish_job(self, **changes: Any) -> None:
        """Publish the job's record.

        Args:
            changes: fields to set otherwise, such as ``state``.
        """
        records = _Records(self._producer)
        said = {**self._job_record(), **changes}  # which takes a moment
        with self._telling:  # heartbeat or micro-batch: whoever comes second has what is newer
            records.put(self._settings.job_topic, "job", {**self.totals(), **said})
        records.flush()

    def totals(self) -> dict[str, Any]:
        """Totals since the first record of the topic, as of the last micro-batch whose windows are published."""
        return {**self._standing, "updated_ms": self._clock.now_ms()}

    def close(self) -> None:
        """Let go of the broker."""
        self._producer.flush(5.0)

    # -- inside

    def _totals(self) -> dict[str, Any]:
        totals = sorted(self._collector.totals.items())
        valid = sum(t.records - t.rejected for _, t in totals)
        counted = self.ledger.counted
        return {
            "batch": self.batch,
            "partitions": {str(p): t.as_record() for p, t in totals},
            "valid": valid,
            "rejected": sum(t.rejected for _, t in totals),
            "counted": counted,
            "late_dropped": valid - counted,
            "ledger": self.ledger.as_record(),
        }

    def _windows(self) -> dict[str, Any]:
        """What the windows are."""
        settings = self._settings
        names = ("tumbling_s", "sliding_s", "slide_s", "watermark_s", "top_n", "ratings_topic", "metrics_topic")
        record = {name: getattr(settings, name) for name in (*names, "batches_topic", "rejected_topic")}
        record["max_ahead_s"] = settings.guard_ms / 1000
        return {**record, "window_types": [s.name for s in self._specs]}

    def _cut(self, batch: int, watermark_ms: int) -> dict[str, Any]:
        """What had been read at the end of a micro-batch; the first time also what the windows are: a later query's may be others."""
        totals = self._collector.totals.items()
        return {
            "batch": batch,
            "at_ms": self._clock.now_ms(),
            "watermark_ms": watermark_ms,
            "partitions": {str(p): t.as_record() for p, t in sorted(totals)},
            **({} if self._windows_told else {"windows": self._windows()}),
        }

    def _publish_rejects(self, before: dict[int, PartitionTotals], records: _Records) -> None:
        for partition, totals in self._collector.totals.items():
            last = before.get(partition)
            if totals.rejected == (last.rejected if last else 0):
                continue
            for reject in self._read_rejects(partition, last.max_offset + 1 if last else 0, totals.max_rejected):
                key = f"{reject['partition']}/{reject['offset']}"
                records.put(self._settings.rejected_topic, key, _readable(reject))


class _Records:
    """Records whose fate their sender waits for: those of a micro-batch, or the job's.

    Heartbeat and micro-batch share a producer. Each has to hear of its own records, whoever waits when they fail.
    """

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._failed: list[tuple[str, KafkaError]] = []

    def put(self, topic: str, key: str, record: dict[str, Any]) -> None:
        """Queue one; waits for room."""
        data = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()

        def told(error: KafkaError | None, _: Any) -> None:
            if error is not None:
                self._failed.append((topic, error))

        while True:
            try:
                self._producer.produce(topic, key=key.encode(), value=data, on_delivery=told)
                return
            except BufferError:
                self.flush()
            except KafkaException as error:
                raise _unwritten(topic, error.args[0]) from error

    def flush(self) -> None:
        """Wait until all are there.

        Raises:
            ProcessingError: one of them is not.
            NotAllowedError: this user may not write there.
        """
        left = self._producer.flush(_FLUSH_DEADLINE_S)
        if self._failed:
            raise _unwritten(*self._failed[0])
        if left:
            raise ProcessingError(
                problem=f"windows could not be published: {left} records not acknowledged", fix="Check the broker"
            )


def _unwritten(topic: str, cause: KafkaError) -> ProcessingError | NotAllowedError:
    problem = f"windows could not be published to topic {topic}: {cause.str()}"
    return error_of(ProcessingError, problem, cause, "Check the broker")


def to_groups(table: Any) -> Groups:
    """An Arrow table of ``job.RESULT_COLUMNS`` → columns."""

    def column(name: str, missing: int = -1) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.asarray(table[name].cast("int64").fill_null(missing).to_numpy(), np.int64)

    packed = [column(f"a{i}", 0) for i in range(5)]
    return Groups(
        pane_ms=column("pane_ms"),
        id=column("id"),
        packed=np.stack(packed, axis=1) if table.num_rows else np.zeros((0, 5), np.int64),
        max_offset=column("max_offset"),
        max_rejected=column("max_rejected"),
        max_event_ms=column("max_event_ms"),
    )


def _readable(reject: dict[str, Any]) -> dict[str, Any]:
    """A rejected record as text; a very long key or value is cut: with the escapes of JSON none is more than a broker takes."""
    readable = dict(reject)
    for name, most in (("key", _MOST_OF_A_KEY), ("value", _MOST_OF_A_VALUE)):
        data = reject[name]
        if data is None:
            continue
        whole = bytes(data)
        try:
            text = whole.decode()
            cut, readable[name] = len(text) > most, text[:most]
        except UnicodeDecodeError:
            cut, readable[name] = len(whole) > most, base64.b64encode(whole[:most]).decode()
            readable[f"{name}_encoding"] = "base64"
        if cut:
            readable[f"{name}_bytes"] = len(whole)
    readable["time"] = iso_ms(int(reject["timestamp_ms"]))
    return readable
