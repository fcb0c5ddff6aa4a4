"""From a batch of ratings into a producer's queue by columns: one call into librdkafka a batch, no Python object a rating.

Only for producers with transactions: messages sent this way make no report that Python could see, so it takes a commit, which
fails if any message did, to know that they arrived.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from confluent_kafka import KafkaError, KafkaException, Producer

from ray_pipeline.codec import TextColumn, encode_columns
from ray_pipeline.delivery.librdkafka import MESSAGE, QUEUE_FULL, Librdkafka
from ray_pipeline.delivery.sending import QueueWait, delivery_error
from ray_pipeline.events import EventBatch

__all__ = ["ColumnSender"]


class ColumnSender:
    """See :class:`Sender`.

    Args:
        producer: where to queue; it must know the topic's partitions, as it does once it was asked for them.
        topic: the topic of the ratings; the partition is the batch's.
    """

    def __init__(self, producer: Producer, topic: str) -> None:
        self._library = Librdkafka()
        self._producer = producer  # the handle lives as long as it does
        self._topic: int | None = self._library.new_topic(self._library.handle_of(producer), topic)
        self._messages = np.zeros(0, MESSAGE)  # kept: fresh memory for each batch costs as much as filling it

    def send(self, batch: EventBatch) -> None:
        """Queue every rating of a batch."""
        keys, values = encode_columns(batch)  # they hold the memory that the messages point to
        try:
            self._queue(batch.partition, self._filled(keys, values))
            self._producer.poll(0)
        except KafkaException as error:
            raise delivery_error(self._producer, batch.partition, "produce", error.args[0]) from error

    def close(self) -> None:
        """Let go of the topic."""
        topic, self._topic = self._topic, None
        if topic is not None:
            self._library.destroy_topic(topic)

    def _queue(self, partition: int, messages: npt.NDArray[np.void]) -> None:
        assert self._topic is not None
        wait = QueueWait(self._producer, partition)
        while len(messages):
            queued = self._library.produce_batch(self._topic, partition, messages)
            if queued == len(messages):
                return
            # those behind a full queue were all left out, so going on with them keeps the order; any other error leaves a hole
            first = int(messages["err"][messages["err"] != 0][0])
            if first != QUEUE_FULL:
                raise KafkaException(KafkaError(first))
            messages = messages[queued:]
            wait.for_room()

    def _filled(self, keys: TextColumn, values: TextColumn) -> npt.NDArray[np.void]:
        if len(self._messages) < len(values):
            self._messages = np.zeros(len(values), MESSAGE)
        messages = self._messages[: len(values)]
        messages["err"] = 0
        messages["payload"] = values.data.ctypes.data + values.offsets[:-1].astype(np.uint64)
        messages["len"] = np.diff(values.offsets)
        if values.missing is not None:
            messages["payload"][values.missing] = 0  # no value at all, which is not an empty one
        messages["key"] = keys.data.ctypes.data + keys.offsets[:-1].astype(np.uint64)
        messages["key_len"] = np.diff(keys.offsets)
        return messages
