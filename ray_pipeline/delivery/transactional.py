"""Exactly-once delivery: a transaction holds ratings and the progress record that says how far they reach.

This is how Kafka Connect's source connectors do it (KIP-618): one ``transactional.id`` a shard, so that opening a shard shuts out
whoever had it before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.delivery.interface import ShardProgress, progress_key
from ray_pipeline.errors import DeliveryError, FencedError
from ray_pipeline.events import EventBatch
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.read import newest_of_key

__all__ = ["TransactionalDelivery"]

TRANSACTION_TIMEOUT_MS = 10_000
"""A shard that died in a transaction holds readers up for so long at most."""
_SEND_DEADLINE_S = 60.0
_COMMIT_DEADLINE_S = 30.0


class TransactionalDelivery:
    """See :class:`ShardDelivery`.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        ratings_topic: where ratings go.
        progress_topic: where progress goes.
        partition: the shard.
    """

    def __init__(self, bootstrap: str, ratings_topic: str, progress_topic: str, partition: int) -> None:
        self._bootstrap = bootstrap
        self._ratings_topic = ratings_topic
        self._progress_topic = progress_topic
        self._partition = partition
        self._producer: Producer | None = None
        self._in_transaction = False

    def open(self, deadline_s: float) -> ShardProgress | None:
        """Fence predecessors, whose open transaction is aborted, and read the last committed progress."""
        end = time.monotonic() + deadline_s
        self._producer = make_producer(
            self._bootstrap,
            transactional_id=f"{self._ratings_topic}-{self._partition}",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        )
        self._do("init_transactions", lambda p: p.init_transactions(deadline_s))
        value = newest_of_key(
            self._bootstrap,
            self._progress_topic,
            progress_key(self._partition),
            max(1.0, end - time.monotonic()),
        )
        return None if value is None else ShardProgress.from_json(value)

    def send(self, batch: EventBatch) -> None:
        """Queue ratings inside the open transaction, or begin one."""
        self._begin()
        produce_all(self._opened(), self._ratings_topic, batch, self._error)

    def commit(self, progress: ShardProgress) -> None:
        """Commit what was sent, with the progress record."""
        self._begin()
        self._do(
            "produce",
            lambda p: p.produce(
                self._progress_topic,
                key=progress_key(self._partition).encode(),
                value=progress.to_json(),
                partition=0,
            ),
        )
        self._do("commit_transaction", lambda p: p.commit_transaction(_COMMIT_DEADLINE_S))
        self._in_transaction = False

    def close(self) -> None:
        """Abort what is open, if the broker still listens; else the next open, or the timeout, does it."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            if self._in_transaction:
                self._in_transaction = False
                producer.abort_transaction(1.0)
            producer.poll(0)
        except KafkaException:  # also a fatal error from before, such as having been fenced
            producer.purge()  # nothing of it may linger and be sent after this object is gone

    def _opened(self) -> Producer:
        if self._producer is None:
            msg = f"shard {self._partition} is not open"
            raise RuntimeError(msg)
        return self._producer

    def _begin(self) -> None:
        if not self._in_transaction:
            self._do("begin_transaction", lambda p: p.begin_transaction())
            self._in_transaction = True

    def _do(self, what: str, call: Callable[[Producer], Any]) -> None:
        try:
            call(self._opened())
        except KafkaException as error:
            raise self._error(what, error) from error
        except BufferError as error:
            raise DeliveryError(problem=f"shard {self._partition}: {what}: the queue is full", fix="") from error

    def _error(self, what: str, error: KafkaException) -> DeliveryError:
        cause = error.args[0]
        if cause.code() == KafkaError._FATAL:  # says only that there was an error before: this call says which
            try:
                self._opened().begin_transaction()
            except KafkaException as first:
                cause = first.args[0]
        return delivery_error(self._partition, what, cause)


def delivery_error(partition: int, what: str, error: KafkaError) -> DeliveryError:
    """The error of our own tree that a Kafka error amounts to."""
    fenced = error.code() in (
        KafkaError._FENCED,
        KafkaError.INVALID_PRODUCER_EPOCH,
        KafkaError.PRODUCER_FENCED,
        KafkaError.INVALID_PRODUCER_ID_MAPPING,
    )
    kind = FencedError if fenced and error.code() != KafkaError.INVALID_PRODUCER_ID_MAPPING else DeliveryError
    return kind(problem=f"shard {partition}: {what}: {error.str()}", fix="")


def produce_all(
    producer: Producer, topic: str, batch: EventBatch, translate: Callable[[str, KafkaException], DeliveryError]
) -> None:
    """Queue every rating of a batch for its partition; wait while the queue is full.

    Raises:
        DeliveryError: the queue stayed full for a minute, or the producer refused a record.
    """
    produce, partition = producer.produce, batch.partition
    deadline: float | None = None
    try:
        for key, value in zip(encode_keys(batch), encode_values(batch), strict=True):
            while True:
                try:
                    produce(topic, value, key, partition)
                    break
                except BufferError:
                    now = time.monotonic()
                    deadline = deadline or now + _SEND_DEADLINE_S
                    if now > deadline:
                        raise DeliveryError(
                            problem=f"shard {partition}: the queue stayed full for {_SEND_DEADLINE_S:.0f} s",
                            fix="The broker is too slow or away: lower the rate or add brokers",
                        ) from None
                    producer.poll(0.05)
        producer.poll(0)
    except KafkaException as error:
        raise translate("produce", error) from error
