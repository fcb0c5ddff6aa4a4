"""Delivers ratings that came from outside, each with the record that says where it stands, visible together."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

_log = logging.getLogger(__name__)

_DEADLINE_S = 30.0
_POLL_S = 0.1

_Place = tuple[int, int]
"""Partition and offset."""


@dataclass(frozen=True, slots=True)
class _Posting:
    """A rating that is delivered.

    Attributes:
        key: its key.
        value: its value as it is written.
        rating: its value in the contract's form.
        place: where it stands; None = nowhere yet.
        recorded: where the record of that stands; None = nowhere yet.
    """

    key: bytes
    value: bytes | None
    rating: bytes | None
    place: _Place | None = None
    recorded: _Place | None = None

    @property
    def record(self) -> tuple[bytes, bytes]:
        """What says where it stands: key and value."""
        assert self.place is not None
        partition, offset = self.place
        said = {"partition": partition, "offset": offset, **json.loads(self.rating or b"")}
        return f"{partition}/{offset}".encode(), json.dumps(said, separators=(",", ":")).encode()


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
        self._doubt: list[_Posting] = []
        """Those of a commit of which it is not known yet what was done, as if all was."""

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
        rows = zip(encode_keys(batch), self._wire.to_wire(batch), ratings, strict=True)
        postings = [_Posting(*row) for row in rows]
        if self._doubt:
            kept = self._kept(producer, self._doubt)
            if [posting.rating for posting in kept] == ratings:
                postings = kept
            else:  # those were given up: what is there of them must have its records all the same
                self._complete(producer, [posting for posting in kept if posting.place is not None])
        self._complete(producer, postings)

    def _complete(self, producer: Producer, postings: Sequence[_Posting]) -> None:
        """Write what is missing of ratings and their records, in one transaction, and wait until it is seen."""
        if any(posting.recorded is None for posting in postings):
            producer.begin_transaction()
            rows = [(p.key, p.value) for p in postings if p.place is None]
            places = self._write(producer, self._ratings_topic, rows)
            new = iter(places)
            postings = [p if p.place is not None else replace(p, place=next(new)) for p in postings]
            records = [p.record for p in postings if p.recorded is None]
            recorded = self._write(producer, self._outside_topic, records, partition=0)
            new = iter(recorded)
            self._doubt = [p if p.recorded is not None else replace(p, recorded=next(new)) for p in postings]
            producer.commit_transaction(_DEADLINE_S)
            # a broker that is killed now may forget to end the transaction, which would hold readers up
            for topic, written in ((self._ratings_topic, places), (self._outside_topic, recorded)):
                ends = {partition: offset + 1 for partition, offset in sorted(written)}
                wait_until_seen(self._bootstrap, topic, ends, _DEADLINE_S)
        self._doubt = []

    def _kept(self, producer: Producer, doubt: Sequence[_Posting]) -> list[_Posting]:
        """Ratings of a commit in doubt, each with what is there of it alone; waits for open transactions.

        A commit may have been kept in some partitions and taken back in others (docs/delivery.md, note on a killed broker).
        """
        ratings = self._there(self._ratings_topic, {p.place: p.value for p in doubt if p.place is not None})
        if len(ratings) == len(doubt) and held_up(self._bootstrap, self._outside_topic):
            # not aborted: who has seen the ratings waits for these records, and the next commit shows them along with its own
            return [replace(p, recorded=None) for p in doubt]
        self._end_left_over(producer, self._outside_topic)
        records = self._there(self._outside_topic, {p.recorded: p.record[1] for p in doubt if p.recorded is not None})
        if lost := [p for p in doubt if p.recorded in records and p.place not in ratings]:
            _log.warning(
                "the broker took %d ratings from outside back and kept their records, such as %s; they are written again",
                len(lost),
                lost[0].record[1].decode(),
            )
        return [
            replace(p, recorded=p.recorded if p.recorded in records else None)
            if p.place in ratings
            else replace(p, place=None, recorded=None)
            for p in doubt
        ]

    def _there(self, topic: str, written: Mapping[_Place, bytes | None]) -> set[_Place]:
        """Where, of some places, there is what was written."""
        there = set()
        for partition in sorted({partition for partition, _ in written}):
            offsets = [offset for p, offset in written if p == partition]
            for record in read_topic_from(self._bootstrap, topic, partition, min(offsets), _DEADLINE_S):
                place = (partition, record.offset)
                if place in written and written[place] == record.value:
                    there.add(place)
                if record.offset >= max(offsets):
                    break
        return there

    def _opened(self) -> Producer:
        """The producer; making one ends what the last one left open, but for records that may be wanted."""
        if self._producer is None:
            self._producer = make_producer(
                self._bootstrap,
                transactional_id=f"{self._ratings_topic}-outside",
                transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
                partitioner="murmur2_random",
            )
            self._producer.init_transactions(_DEADLINE_S)
            self._end_left_over(self._producer, self._ratings_topic, *([] if self._doubt else [self._outside_topic]))
        return self._producer

    def _end_left_over(self, producer: Producer, *topics: str) -> None:
        """Abort what is left open in topics, and its coordinator has forgotten."""
        places = [(topic, partition) for topic in topics for partition in held_up(self._bootstrap, topic)]
        if places:
            abort_left_over(producer, places, _DEADLINE_S)

    def _write(
        self, producer: Producer, topic: str, rows: Sequence[tuple[bytes, bytes | None]], partition: int = -1
    ) -> list[_Place]:
        """Write records, by the partitioner where no partition is given, and wait for the broker; their partitions and offsets.

        Raises:
            DeliveryError: the broker did not take them all within the deadline, or refused one.
        """
        deadline = time.monotonic() + _DEADLINE_S
        places: list[_Place] = [(-1, -1)] * len(rows)
        failures: list[str] = []

        def placed(at: int, error: Any, message: Any) -> None:
            if error is not None:
                failures.append(error.str())
                return
            places[at] = (message.partition(), message.offset())

        for at, (key, value) in enumerate(rows):
            while True:
                try:
                    producer.produce(topic, value, key, partition, on_delivery=functools.partial(placed, at))
                    break
                except BufferError:  # its queue is full: what the broker answers makes room
                    if time.monotonic() > deadline:
                        problem = f"ratings from outside: the queue stayed full for {_DEADLINE_S:.0f} s"
                        raise DeliveryError(problem=problem, fix="The broker is too slow or away") from None
                    producer.poll(_POLL_S)
        left = producer.flush(max(0.0, deadline - time.monotonic()))
        if failures or left:
            reason = failures[0] if failures else f"{left} were not acknowledged within {_DEADLINE_S:.0f} s"
            raise DeliveryError(problem=f"ratings from outside: {reason}", fix="The broker is too slow or away")
        return places
