"""At-least-once delivery: no transactions. After a crash, what was sent since the last progress record may be sent again."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from confluent_kafka import KafkaException, Producer

from ray_pipeline.delivery.interface import ShardProgress, progress_key
from ray_pipeline.delivery.sending import PartitionCheck, RecordSender, delivery_error, reading
from ray_pipeline.errors import DeliveryError
from ray_pipeline.events import EventBatch
from ray_pipeline.formats.interface import CONTRACT, WireFormat
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.read import newest_of_key, newest_values, oldest_values

__all__ = ["IdempotentDelivery"]

_COMMIT_DEADLINE_S = 30.0


class IdempotentDelivery:
    """See :class:`ShardDelivery`; but ratings are visible as soon as they are sent, and predecessors are not shut out.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        ratings_topic: where ratings go.
        progress_topic: where progress goes.
        partition: the shard.
        partitions: how many partitions the ratings topic must have.
        wire: how values are written.
    """

    def __init__(
        self,
        bootstrap: str,
        ratings_topic: str,
        progress_topic: str,
        partition: int,
        partitions: int,
        wire: WireFormat = CONTRACT,
    ) -> None:
        self._bootstrap = bootstrap
        self._ratings_topic = ratings_topic
        self._progress_topic = progress_topic
        self._partition = partition
        self._wire = wire
        self._check = PartitionCheck(ratings_topic, partitions, partition)
        self._producer: Producer | None = None
        self._failed: Any = None

    def open(self, deadline_s: float) -> ShardProgress | None:
        """Read the last progress."""
        end = time.monotonic() + deadline_s
        # a message timeout would turn an outage into a hole in the sequence: the commit's deadline bounds it instead
        self._producer = make_producer(
            self._bootstrap, on_delivery=self._delivered, delivery_report_only_error=True, message_timeout_ms=0
        )
        self._check.now(self._producer, deadline_s)
        left_s = max(1.0, end - time.monotonic())
        with reading(self._producer, self._partition):
            value = newest_of_key(self._bootstrap, self._progress_topic, progress_key(self._partition), left_s)
        return None if value is None else ShardProgress.from_json(value)

    def newest(self, count: int, deadline_s: float) -> list[bytes | None]:
        """Values of the newest records of the shard's partition, the last one first."""
        with reading(self._opened(), self._partition):
            found = newest_values(self._bootstrap, self._ratings_topic, self._partition, count, deadline_s)
        return self._wire.from_wire(found)

    def oldest(self, count: int, deadline_s: float) -> list[bytes | None]:
        """Values of the first committed records of the shard's partition, in their order."""
        with reading(self._opened(), self._partition):
            found = oldest_values(self._bootstrap, self._ratings_topic, self._partition, count, deadline_s)
        return self._wire.from_wire(found)

    def send(self, batch: EventBatch) -> None:
        """Queue ratings."""
        self._raise_failure()
        RecordSender(self._opened(), self._ratings_topic, self._wire).send(batch)

    def commit(self, progress: ShardProgress) -> None:
        """Wait until all ratings are acknowledged, then record the progress."""
        self._check.now_and_then(self._opened())
        self._flush()
        key = progress_key(self._partition).encode()
        try:
            self._opened().produce(self._progress_topic, key=key, value=progress.to_json(), partition=0)
        except KafkaException as error:
            raise delivery_error(self._opened(), self._partition, "produce", error.args[0]) from error
        self._flush()

    def confirm(self, progress: ShardProgress, deadline_s: float) -> None:
        """What was acknowledged is seen: there is no transaction that could be taken back."""

    def close(self) -> None:
        """Drop what was not acknowledged."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.purge()
            with contextlib.suppress(KafkaException):  # a fatal error, which was raised before, is said here once more
                producer.poll(0)

    def _opened(self) -> Producer:
        if self._producer is None:
            msg = f"shard {self._partition} is not open"
            raise RuntimeError(msg)
        return self._producer

    def _flush(self) -> None:
        deadline = time.monotonic() + _COMMIT_DEADLINE_S
        while self._opened().flush(0.5):
            self._raise_failure()
            if time.monotonic() > deadline:
                raise DeliveryError(
                    problem=f"shard {self._partition}: not acknowledged within {_COMMIT_DEADLINE_S:.0f} s",
                    fix="The broker is too slow or away",
                )
        self._raise_failure()

    def _delivered(self, error: Any, _message: Any) -> None:
        if error is not None and self._failed is None:
            self._failed = error

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise delivery_error(self._opened(), self._partition, "delivery", self._failed)
