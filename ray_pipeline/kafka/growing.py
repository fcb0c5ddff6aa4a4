"""A topic that is read again and again, each time up to what had been written to it by then."""

from __future__ import annotations

import time

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from ray_pipeline.errors import BrokerUnavailableError
from ray_pipeline.kafka.client import make_consumer, watermark_offsets
from ray_pipeline.kafka.read import FILLED_S, Record, record_of

__all__ = ["GrowingTopic"]

_AT_ONCE = 10_000


class GrowingTopic:
    """Reads the first partition of a topic; a topic that does not exist is empty. One owner, one thread.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topic: the topic.
    """

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._topic = topic
        self._next = 0
        self._assigned = False
        # a reader of committed records is not told of the end behind an open transaction
        self._all = make_consumer(bootstrap, isolation_level="read_uncommitted")
        self._committed = make_consumer(bootstrap)

    def read_new(self, timeout_s: float = 30.0) -> list[Record]:
        """The committed records that were written since the last call, all that had been when this one began.

        Waits for transactions that are open. So what was made visible together with a record that somebody has seen is in it.

        Raises:
            BrokerUnavailableError: not within ``timeout_s`` seconds.
            KafkaException: the broker does not answer.
        """
        try:
            end = self._end()
        except KafkaException as unknown:
            if unknown.args[0].code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION):
                return []
            raise
        found: list[Record] = []
        deadline = time.monotonic() + timeout_s
        while self._next < end:
            if not self._assigned:
                self._committed.assign([TopicPartition(self._topic, 0, self._next)])
                self._assigned = True
            for message in self._committed.consume(_AT_ONCE, timeout=FILLED_S):
                error = message.error()
                if error is None:
                    found.append(record_of(message))
                elif error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
            self._next = max(self._next, self._committed.position([TopicPartition(self._topic, 0)])[0].offset)
            if self._next < end and time.monotonic() > deadline:
                raise BrokerUnavailableError(
                    problem=f"topic {self._topic} could not be read to its end within {timeout_s:.0f} s",
                    fix="A transaction may be open; try again",
                )
        return found

    def close(self) -> None:
        """Let go of the broker."""
        self._all.close()
        self._committed.close()

    def _end(self) -> int:
        metadata = self._all.list_topics(self._topic, timeout=15).topics[self._topic]
        if metadata.error is not None:
            raise KafkaException(metadata.error)
        low, end = watermark_offsets(self._all, self._topic, 0)
        self._next = max(self._next, low)
        return end
