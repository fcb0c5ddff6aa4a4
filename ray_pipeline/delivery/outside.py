"""Delivers ratings that came from outside, each with the record that says where it stands, visible together."""

from __future__ import annotations

import contextlib
import functools
import json
import uuid
from typing import Any

from confluent_kafka import KafkaException, Producer

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.delivery.transactional import TRANSACTION_TIMEOUT_MS
from ray_pipeline.errors import DeliveryError
from ray_pipeline.events import EventBatch
from ray_pipeline.formats.interface import CONTRACT, WireFormat
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.read import newest_values

__all__ = ["OutsideDelivery"]

_DEADLINE_S = 30.0


class OutsideDelivery:
    """Writes ratings into the topic of ratings beside the shards, by the contract's partitioner. One owner, one thread.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        ratings_topic: where ratings go.
        outside_topic: where the records of them go.
        wire: how values are written.
    """

    def __init__(self, bootstrap: str, ratings_topic: str, outside_topic: str, wire: WireFormat = CONTRACT) -> None:
        self._wire = wire
        self._bootstrap = bootstrap
        self._ratings_topic = ratings_topic
        self._outside_topic = outside_topic
        # of this process alone: nobody else's ratings are shut out by it
        self._identity = f"{ratings_topic}-outside-{uuid.uuid4().hex[:12]}"
        self._producer: Producer | None = None
        self._doubtful: list[bytes] = []

    def deliver(self, batch: EventBatch) -> None:
        """Write some ratings, in one transaction. Blocks. After an error call it again with the same ratings: none is written twice.

        Args:
            batch: the ratings; partition and index mean nothing.

        Raises:
            DeliveryError: they are not visible, or it is not known whether they are.
        """
        try:
            self._deliver(batch)
        except KafkaException as error:
            self.close()
            raise DeliveryError(problem=f"ratings from outside: {error.args[0].str()}") from error
        except DeliveryError:
            self.close()
            raise

    def close(self) -> None:
        """Drop what was not committed and let go of the broker; may be called twice."""
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(KafkaException):
                producer.abort_transaction(1.0)
            producer.purge()
            with contextlib.suppress(KafkaException):  # a fatal error, which was raised before, is said here once more
                producer.poll(0)

    # -- inside

    def _deliver(self, batch: EventBatch) -> None:
        producer = self._opened()
        doubtful, self._doubtful = self._doubtful, []
        if doubtful and doubtful[-1] in newest_values(
            self._bootstrap, self._outside_topic, 0, len(doubtful) + 1, _DEADLINE_S
        ):
            return
        producer.begin_transaction()
        records = self._send(producer, batch)
        for record in records:
            place = json.loads(record)
            key = f"{place['partition']}/{place['offset']}"
            producer.produce(self._outside_topic, record, key.encode(), 0)
        self._doubtful = records
        producer.commit_transaction(_DEADLINE_S)
        self._doubtful = []

    def _opened(self) -> Producer:
        """The producer; making one ends what the last one left open."""
        if self._producer is None:
            self._producer = make_producer(
                self._bootstrap,
                transactional_id=self._identity,
                transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
                partitioner="murmur2_random",
            )
            self._producer.init_transactions(_DEADLINE_S)
        return self._producer

    def _send(self, producer: Producer, batch: EventBatch) -> list[bytes]:
        """Write the ratings; returns the records that tell where they stand, in their order."""
        records: list[bytes | None] = [None] * len(batch)
        failures: list[str] = []

        def placed(at: int, rating: bytes | None, error: Any, message: Any) -> None:
            if error is not None:
                failures.append(error.str())
                return
            record = {"partition": message.partition(), "offset": message.offset(), **json.loads(rating or b"")}
            records[at] = json.dumps(record, separators=(",", ":")).encode()

        rows = zip(encode_keys(batch), self._wire.to_wire(batch), encode_values(batch), strict=True)
        for at, (key, value, rating) in enumerate(rows):
            producer.produce(self._ratings_topic, value, key, on_delivery=functools.partial(placed, at, rating))
        left = producer.flush(_DEADLINE_S)
        if failures or left:
            reason = failures[0] if failures else f"{left} were not acknowledged within {_DEADLINE_S:.0f} s"
            raise DeliveryError(problem=f"ratings from outside: {reason}", fix="The broker is too slow or away")
        return [record for record in records if record is not None]
