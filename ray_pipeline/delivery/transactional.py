"""Exactly-once delivery: a transaction holds ratings and the progress record that says how far they reach.

This is how Kafka Connect's source connectors do it (KIP-618): one ``transactional.id`` a shard, so that opening a shard shuts out
whoever had it before.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from confluent_kafka import KafkaException, Producer

from ray_pipeline.delivery.interface import ShardProgress, progress_key
from ray_pipeline.delivery.sending import PartitionCheck, RecordSender, Sender, delivery_error, reading
from ray_pipeline.errors import DeliveryError
from ray_pipeline.events import EventBatch
from ray_pipeline.formats.interface import CONTRACT, WireFormat
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.read import held_up, newest_of_key, newest_values, oldest_values

_log = logging.getLogger(__name__)

__all__ = ["TRANSACTION_TIMEOUT_MS", "TransactionalDelivery", "abort_left_over"]

TRANSACTION_TIMEOUT_MS = 10_000
"""A shard that died in a transaction holds readers up for so long at most."""
_COMMIT_DEADLINE_S = 30.0
_LINGER_MS = 20
"""Fewer and larger requests. Nothing is seen later for it: a commit, before which nobody sees anything, does not wait for it."""


class TransactionalDelivery:
    """See :class:`ShardDelivery`.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        ratings_topic: where ratings go.
        progress_topic: where progress goes.
        partition: the shard.
        partitions: how many partitions the ratings topic must have.
        make_sender: how ratings get into the queue of a producer, for a topic.
        wire: how values are written, for what is read back.
    """

    def __init__(
        self,
        bootstrap: str,
        ratings_topic: str,
        progress_topic: str,
        partition: int,
        partitions: int,
        make_sender: Callable[[Producer, str], Sender] = RecordSender,
        wire: WireFormat = CONTRACT,
    ) -> None:
        self._bootstrap = bootstrap
        self._ratings_topic = ratings_topic
        self._progress_topic = progress_topic
        self._partition = partition
        self._make_sender = make_sender
        self._wire = wire
        self._check = PartitionCheck(ratings_topic, partitions, partition)
        self._producer: Producer | None = None
        self._sender: Sender | None = None
        self._in_transaction = False

    def open(self, deadline_s: float) -> ShardProgress | None:
        """Fence predecessors, whose open transaction is aborted, and read the last committed progress."""
        end = time.monotonic() + deadline_s
        self._producer = make_producer(
            self._bootstrap,
            transactional_id=f"{self._ratings_topic}-{self._partition}",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            linger_ms=_LINGER_MS,
        )
        self._do("init_transactions", lambda p: p.init_transactions(deadline_s))
        self._check.now(self._producer, _left(end))
        self._sender = self._make_sender(self._producer, self._ratings_topic)
        with reading(self._producer, self._partition):
            self._end_left_over(_left(end))
        value = self._recorded(_left(end))
        return None if value is None else ShardProgress.from_json(value)

    def newest(self, count: int, deadline_s: float) -> list[bytes | None]:
        """Values of the newest committed records of the shard's partition, the last one first."""
        with reading(self._opened(), self._partition):
            found = newest_values(self._bootstrap, self._ratings_topic, self._partition, count, deadline_s)
        return self._wire.from_wire(found)

    def oldest(self, count: int, deadline_s: float) -> list[bytes | None]:
        """Values of the first committed records of the shard's partition, in their order."""
        with reading(self._opened(), self._partition):
            found = oldest_values(self._bootstrap, self._ratings_topic, self._partition, count, deadline_s)
        return self._wire.from_wire(found)

    def send(self, batch: EventBatch) -> None:
        """Queue ratings inside the open transaction, or begin one."""
        self._begin()
        assert self._sender is not None
        self._sender.send(batch)

    def commit(self, progress: ShardProgress) -> None:
        """Commit what was sent, with the progress record."""
        self._begin()
        self._check.now_and_then(self._opened())
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

    def confirm(self, progress: ShardProgress, deadline_s: float) -> None:
        """Read the record back, however long its transaction, or one before it, stays open."""
        if self._recorded(deadline_s) != progress.to_json():
            raise DeliveryError(problem=f"shard {self._partition}: the broker took a commit back that it had answered")

    def close(self) -> None:
        """Abort what is open, if the broker still listens; else the next open, or the timeout, does it."""
        producer, self._producer = self._producer, None
        sender, self._sender = self._sender, None
        if producer is None:
            return
        try:
            if self._in_transaction:
                self._in_transaction = False
                producer.abort_transaction(1.0)
        except KafkaException:
            producer.purge()  # nothing of it may linger and be sent after this object is gone
        with contextlib.suppress(KafkaException):  # a fatal error, which was raised before, is said here once more
            producer.poll(0)
        if sender is not None:
            sender.close()

    def _end_left_over(self, deadline_s: float) -> None:
        """Abort what the coordinator knows nothing of any more.

        A broker that is killed after it decided to commit, but before it marked the partitions, can come up and forget to (seen with
        Kafka 4.3.1, whose coordinator takes partitions that have no leader yet for deleted). Readers would wait there for ever, and
        what lies there would be seen together with the next commit, which sends it again. Nobody has seen it, and the progress
        record lies in it too: an aborted transaction over the same partitions takes both back. In the topic of progress other
        shards have transactions open, so it cannot be told whether one was left there: there it is done every time.
        """
        places = [(self._progress_topic, 0)]
        if held_up(self._bootstrap, self._ratings_topic, [self._partition]):
            _log.warning("shard %d: a transaction is open in its partition; one of its own is aborted", self._partition)
            places.append((self._ratings_topic, self._partition))
        self._in_transaction = True
        self._do("abort what was left open", lambda p: abort_left_over(p, places, deadline_s))
        self._in_transaction = False

    def _recorded(self, deadline_s: float) -> bytes | None:
        with reading(self._opened(), self._partition):
            return newest_of_key(self._bootstrap, self._progress_topic, progress_key(self._partition), deadline_s)

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
        producer = self._opened()
        try:
            call(producer)
        except KafkaException as error:
            raise delivery_error(producer, self._partition, what, error.args[0]) from error
        except BufferError as error:
            raise DeliveryError(problem=f"shard {self._partition}: {what}: the queue is full") from error


def abort_left_over(producer: Producer, places: Sequence[tuple[str, int]], deadline_s: float) -> None:
    """Abort what a producer's ``transactional.id`` left open in some partitions and its coordinator has forgotten. Blocks.

    An abort marks the partitions of its transaction, whoever of that id wrote there: so one with nothing in it is made.

    Args:
        producer: ready for its first transaction.
        places: topic and partition of each.
        deadline_s: how long to wait for the broker, seconds.

    Raises:
        KafkaException: the broker did not do it.
    """
    producer.begin_transaction()
    for topic, partition in places:
        producer.produce(topic, value=b"", key=b"", partition=partition)
    producer.flush(deadline_s)
    producer.abort_transaction(deadline_s)


def _left(end: float) -> float:
    return max(1.0, end - time.monotonic())
