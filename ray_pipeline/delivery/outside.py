"""Delivers ratings that came from outside, each with the record that says where it stands, visible together."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaException, Producer

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.delivery.transactional import TRANSACTION_TIMEOUT_MS, abort_left_over
from ray_pipeline.errors import BrokerUnavailableError, DeliveryError
from ray_pipeline.events import EventBatch
from ray_pipeline.formats.interface import CONTRACT, WireFormat
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.read import held_up, read_topic_from, wait_until_seen

__all__ = ["OutsideDelivery"]

_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A commit of which it is not known yet whether it was done: its ratings, and its last record with the offset."""

    ratings: list[bytes | None]
    record: bytes
    offset: int


class OutsideDelivery:
    """Writes ratings into the topic of ratings beside the shards, by the contract's partitioner. One owner, one thread.

    All of a topic share one ``transactional.id``: whoever opens next ends what one that was killed left open. Two that write by turns
    shut each other out and begin again, which loses and repeats nothing.

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
        self._producer: Producer | None = None
        self._doubt: _Doubt | None = None

    def deliver(self, batch: EventBatch) -> None:
        """Write some ratings, in one transaction, and wait until they are seen. Blocks.

        After an error call it again with the same ratings: none is written twice.

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
        except BrokerUnavailableError as error:
            self.close()
            raise DeliveryError(f"ratings from outside: {error.problem}", error.fix) from error
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
        producer, ratings = self._opened(), encode_values(batch)
        if self._doubt is not None:
            done = self._doubt.ratings == ratings and self._is_there(self._doubt)
            self._doubt = None  # not before there is an answer
            if done:
                return
        producer.begin_transaction()
        rows = zip(encode_keys(batch), self._wire.to_wire(batch), strict=True)
        places = self._write(producer, self._ratings_topic, list(rows))
        records = [_record(place, rating) for place, rating in zip(places, ratings, strict=True)]
        keys = [f"{partition}/{offset}".encode() for partition, offset in places]
        recorded = self._write(producer, self._outside_topic, list(zip(keys, records, strict=True)), partition=0)
        self._doubt = _Doubt(ratings, records[-1], recorded[-1][1])
        producer.commit_transaction(_DEADLINE_S)
        # a broker that is killed now may forget to end the transaction, which would hold readers up
        for topic, written in ((self._ratings_topic, places), (self._outside_topic, recorded)):
            ends = {partition: offset + 1 for partition, offset in sorted(written)}
            wait_until_seen(self._bootstrap, topic, ends, _DEADLINE_S)
        self._doubt = None

    def _is_there(self, doubt: _Doubt) -> bool:
        """Whether the commit was done; waits for open transactions."""
        found = next(read_topic_from(self._bootstrap, self._outside_topic, 0, doubt.offset, _DEADLINE_S), None)
        return found is not None and (found.offset, found.value) == (doubt.offset, doubt.record)

    def _opened(self) -> Producer:
        """The producer; making one ends what the last one left open."""
        if self._producer is None:
            self._producer = make_producer(
                self._bootstrap,
                transactional_id=f"{self._ratings_topic}-outside",
                transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
                partitioner="murmur2_random",
            )
            self._producer.init_transactions(_DEADLINE_S)
            topics = (self._ratings_topic, self._outside_topic)
            places = [(topic, partition) for topic in topics for partition in held_up(self._bootstrap, topic)]
            if places:
                abort_left_over(self._producer, places, _DEADLINE_S)
        return self._producer

    def _write(
        self, producer: Producer, topic: str, rows: Sequence[tuple[bytes, bytes | None]], partition: int = -1
    ) -> list[tuple[int, int]]:
        """Write records, by the partitioner where no partition is given, and wait for the broker; their partitions and offsets."""
        places: list[tuple[int, int]] = [(-1, -1)] * len(rows)
        failures: list[str] = []

        def placed(at: int, error: Any, message: Any) -> None:
            if error is not None:
                failures.append(error.str())
                return
            places[at] = (message.partition(), message.offset())

        for at, (key, value) in enumerate(rows):
            producer.produce(topic, value, key, partition, on_delivery=functools.partial(placed, at))
        left = producer.flush(_DEADLINE_S)
        if failures or left:
            reason = failures[0] if failures else f"{left} were not acknowledged within {_DEADLINE_S:.0f} s"
            raise DeliveryError(problem=f"ratings from outside: {reason}", fix="The broker is too slow or away")
        return places


def _record(place: tuple[int, int], rating: bytes | None) -> bytes:
    """What says where a rating from outside stands."""
    partition, offset = place
    return json.dumps(
        {"partition": partition, "offset": offset, **json.loads(rating or b"")}, separators=(",", ":")
    ).encode()
