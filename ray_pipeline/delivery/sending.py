"""From a batch of ratings into a producer's queue: record by record, and what both ways of sending share."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from confluent_kafka import KafkaError, KafkaException, Producer

from ray_pipeline.codec import encode_keys
from ray_pipeline.errors import BrokerUnavailableError, DeliveryError, FencedError, NotAllowedError, StateMismatchError
from ray_pipeline.events import EventBatch
from ray_pipeline.formats.interface import CONTRACT, WireFormat
from ray_pipeline.kafka.client import error_of

__all__ = ["PartitionCheck", "QueueWait", "RecordSender", "Sender", "delivery_error", "reading"]

_log = logging.getLogger(__name__)

_SEND_DEADLINE_S = 60.0
_CHECK_EVERY_S = 10.0
_CHECK_TIMEOUT_S = 2.0
_POLL_S = 0.05
_FENCED = (KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED)
_WITHOUT_CAUSE = (KafkaError._FATAL, KafkaError._STATE)
_turn = threading.Lock()
"""Whose turn it is among the shards of a process. ``produce()`` lets go of the interpreter for each rating, and has to wait for it
where another shard takes it meanwhile, which costs CPU time."""


class Sender(Protocol):
    """Puts ratings of one shard into the queue of a producer, in their order. One owner, one thread."""

    def send(self, batch: EventBatch) -> None:
        """Queue every rating of a batch; wait while the queue is full.

        Raises:
            DeliveryError: the queue stayed full for a minute, or the producer refused a record. Part of the batch may be queued.
            FencedError: a successor took over.
        """
        ...

    def close(self) -> None:
        """Let go of the producer, which must still be alive; may be called twice."""
        ...


class RecordSender:
    """See :class:`Sender`: the producer's own ``produce()`` for each rating.

    Args:
        producer: where to queue.
        topic: the topic of the ratings; the partition is the batch's.
        wire: how values are written.
    """

    def __init__(self, producer: Producer, topic: str, wire: WireFormat = CONTRACT) -> None:
        self._producer = producer
        self._topic = topic
        self._wire = wire

    def send(self, batch: EventBatch) -> None:
        """Queue every rating of a batch."""
        produce, topic, partition = self._producer.produce, self._topic, batch.partition
        wait = QueueWait(self._producer, partition)
        try:
            with _turn:
                for key, value in zip(encode_keys(batch), self._wire.to_wire(batch), strict=True):
                    while True:
                        try:
                            produce(topic, value, key, partition)
                            break
                        except BufferError:
                            with _turn_of_others():
                                wait.for_room()
                self._producer.poll(0)
        except KafkaException as error:
            raise delivery_error(self._producer, partition, "produce", error.args[0]) from error

    def close(self) -> None:
        """Nothing is held."""


@contextlib.contextmanager
def _turn_of_others() -> Iterator[None]:
    _turn.release()
    try:
        yield
    finally:
        _turn.acquire()


@contextlib.contextmanager
def reading(producer: Producer, partition: int) -> Iterator[None]:
    """What goes wrong while topics are read is a failure of the shard's delivery."""
    try:
        yield
    except KafkaException as error:
        raise delivery_error(producer, partition, "open", error.args[0]) from error
    except NotAllowedError:
        raise
    except BrokerUnavailableError as error:
        raise DeliveryError(error.problem, error.fix) from error


class QueueWait:
    """Waits for room in a producer's queue, for a minute in all.

    Args:
        producer: whose queue is full.
        partition: the shard, for the message.
    """

    def __init__(self, producer: Producer, partition: int) -> None:
        self._producer = producer
        self._partition = partition
        self._deadline: float | None = None

    def for_room(self) -> None:
        """Serve what the broker answered, which makes room.

        Raises:
            DeliveryError: the queue has been full for a minute.
        """
        now = time.monotonic()
        self._deadline = self._deadline or now + _SEND_DEADLINE_S
        if now > self._deadline:
            raise DeliveryError(
                problem=f"shard {self._partition}: the queue stayed full for {_SEND_DEADLINE_S:.0f} s",
                fix="The broker is too slow or away: lower the rate or add brokers",
            )
        self._producer.poll(_POLL_S)


class PartitionCheck:
    """Notices that the ratings topic does not have the partitions this stream was made for.

    A user's partition is a hash of its key modulo their number: with another number every other client looks elsewhere.

    Args:
        topic: the topic of the ratings.
        partitions: how many it must have.
        shard: the shard, for the message.
    """

    def __init__(self, topic: str, partitions: int, shard: int) -> None:
        self._topic = topic
        self._partitions = partitions
        self._shard = shard
        self._next = 0.0

    def now(self, producer: Producer, timeout_s: float) -> None:
        """Ask the broker. Blocks.

        Raises:
            StateMismatchError: the topic has another number of partitions.
            DeliveryError: the topic is not there, or the broker did not answer within ``timeout_s`` seconds.
        """
        try:
            self._ask(producer, timeout_s)
        except KafkaException as error:
            raise delivery_error(producer, self._shard, f"topic {self._topic}", error.args[0]) from error

    def now_and_then(self, producer: Producer) -> None:
        """Ask at most every ten seconds; a broker that does not answer is left to the commit, which needs it anyway.

        Raises:
            StateMismatchError: the topic has another number of partitions.
            DeliveryError: the topic is not there.
        """
        if time.monotonic() < self._next:
            return
        try:
            self._ask(producer, _CHECK_TIMEOUT_S)
        except KafkaException as error:
            _log.info("shard %d: partitions of the topic not checked: %s", self._shard, error.args[0].str())

    def _ask(self, producer: Producer, timeout_s: float) -> None:
        self._next = time.monotonic() + _CHECK_EVERY_S
        found = producer.list_topics(self._topic, timeout=timeout_s).topics[self._topic]
        if found.error is not None:
            raise delivery_error(producer, self._shard, f"topic {self._topic}", found.error)
        if len(found.partitions) != self._partitions:
            raise StateMismatchError(
                problem=f"topic {self._topic} has {len(found.partitions)} partitions now, "
                f"the stream in it was made for {self._partitions}",
                fix="Name another topic with --ratings-topic, or clear this one with: ray-pipeline reset",
            )


def delivery_error(producer: Producer, partition: int, what: str, error: KafkaError) -> DeliveryError:
    """The error of our own tree that a Kafka error amounts to."""
    cause = _cause(producer, error) if error.code() in _WITHOUT_CAUSE else error
    kind = FencedError if cause.code() in _FENCED else DeliveryError
    return error_of(kind, f"shard {partition}: {what}: {cause.str()}", cause)


def _cause(producer: Producer, error: KafkaError) -> KafkaError:
    """Why a producer is of no more use: any call for a transaction says it, and does nothing else in this state."""
    try:
        producer.begin_transaction()
    except KafkaException as refusal:
        found: KafkaError = refusal.args[0]
        if found.code() != KafkaError._NOT_CONFIGURED:  # a producer without transactions has no more to say
            return found
    return error
