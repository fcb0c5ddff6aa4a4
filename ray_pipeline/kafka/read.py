"""Reading topics: counts, tails, the newest record of each key, and following as records come."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from ray_pipeline.codec import parse_object
from ray_pipeline.errors import BrokerUnavailableError, RecordError
from ray_pipeline.kafka.client import error_of, make_consumer, watermark_offsets

__all__ = [
    "FILLED_S",
    "FOLLOWED_MS",
    "Backlog",
    "LatestRecords",
    "Record",
    "TopicCount",
    "count_records",
    "follow",
    "held_up",
    "newest_of_key",
    "newest_records",
    "newest_since",
    "newest_values",
    "oldest_values",
    "read_compacted",
    "read_topic",
    "read_topic_from",
    "record_of",
    "tail",
    "wait_until_seen",
]

_log = logging.getLogger(__name__)

_AT_ONCE = 10_000
_LOOK_AGAIN_S = 0.02
FILLED_S = 0.02
"""How long to wait until so many messages are there: a client waits for all of them, and at the end of a topic there never are."""
FOLLOWED_MS = 500
"""How long the broker may keep the answer to a reader that waits for the next record. It answers as soon as there is one, and is asked
in vain twice a second in place of a hundred times; who must know that a topic has ended there is answered too late so."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a topic."""

    topic: str
    partition: int
    offset: int
    key: str | None
    value: bytes | None
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class TopicCount:
    """How many data records a topic has, without the markers of transactions."""

    topic: str
    total: int
    partitions: dict[int, int]


def count_records(bootstrap: str, topic: str, timeout_s: float = 600.0) -> TopicCount:
    """Count the committed data records of a topic by reading it."""
    counts = dict.fromkeys(_partitions(bootstrap, topic), 0)
    for message in _read_to_end(bootstrap, topic, dict.fromkeys(counts, 0), timeout_s):
        counts[_place(message)[0]] += 1
    return TopicCount(topic, sum(counts.values()), counts)


def read_topic(bootstrap: str, topic: str, timeout_s: float = 600.0) -> Iterator[Record]:
    """Every committed data record of a topic, in order within a partition."""
    for message in _read_to_end(bootstrap, topic, dict.fromkeys(_partitions(bootstrap, topic), 0), timeout_s):
        yield record_of(message)


def read_topic_from(
    bootstrap: str, topic: str, partition: int, offset: int, timeout_s: float = 60.0
) -> Iterator[Record]:
    """Every committed data record of a partition from an offset on (or from the first that is still there)."""
    first = max(offset, _partitions(bootstrap, topic).get(partition, 0))
    for message in _read_to_end(bootstrap, topic, {partition: first}, timeout_s):
        yield record_of(message)


def tail(bootstrap: str, topic: str, count: int, timeout_s: float = 30.0) -> list[Record]:
    """The last ``count`` committed records over all partitions, oldest first (by the time Kafka has for them)."""
    if count < 1:
        return []
    starts = _partitions(bootstrap, topic)
    ends = _ends(bootstrap, topic, list(starts))
    for froms in _further_back(starts, ends, max(100, 4 * count)):
        found: dict[int, list[Record]] = {p: [] for p in starts}
        for message in _read_to_end(bootstrap, topic, froms, timeout_s):
            record = record_of(message)
            found[record.partition] = [*found[record.partition][-count + 1 :], record]
        if all(len(found[p]) >= count or froms[p] == starts[p] for p in starts):
            break
    return sorted((r for records in found.values() for r in records), key=lambda r: r.timestamp_ms)[-count:]


def newest_records(
    bootstrap: str, topic: str, timeout_s: float = 60.0, each: Callable[[Record], None] | None = None
) -> dict[str, Record]:
    """The newest committed record of each key, whatever it holds; none of those keys that were deleted.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topic: the topic.
        timeout_s: how long the reading may take, seconds.
        each: is called with every record that has a key, older ones too, in order within a partition.
    """
    newest: dict[str, Record] = {}
    for message in _read_to_end(bootstrap, topic, {p: 0 for p in _partitions(bootstrap, topic)}, timeout_s):
        record = record_of(message)
        if record.key is None:
            continue
        if each is not None:
            each(record)
        if record.value is None:
            newest.pop(record.key, None)
        else:
            newest[record.key] = record
    return newest


def read_compacted(bootstrap: str, topic: str, timeout_s: float = 60.0) -> dict[str, dict[str, Any]]:
    """The newest committed value of each key, all of them JSON objects.

    Raises:
        RecordError: one of them is none.
    """
    return {key: _object_of(record) for key, record in newest_records(bootstrap, topic, timeout_s).items()}


def newest_of_key(bootstrap: str, topic: str, key: str, timeout_s: float, *, committed: bool = True) -> bytes | None:
    """The newest value of one key of a one-partition topic, read from the end backwards.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topic: the topic.
        key: the key.
        timeout_s: how long to wait for the broker, seconds.
        committed: whether to wait for open transactions; needless for a key that is never written in one.
    """
    value = None
    for froms in _further_back(_partitions(bootstrap, topic), _ends(bootstrap, topic, [0]), 1000):
        for message in _read_to_end(bootstrap, topic, froms, timeout_s, committed):
            if message.key() == key.encode():
                value = message.value()
        if value is not None:
            break
    return value


def newest_since(bootstrap: str, topic: str, prefix: str, at_ms: int, timeout_s: float) -> dict[str, dict[str, Any]]:
    """The newest value of each key that begins with a prefix, of a one-partition topic, written at or after a time.

    Values that are no JSON objects are passed over. Open transactions are not waited for: for keys that are never written in one.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topic: the topic.
        prefix: how the keys begin.
        at_ms: epoch milliseconds; records from before it are not read.
        timeout_s: how long to wait for the broker, seconds.
    """
    ends = _ends(bootstrap, topic, [0])
    consumer = make_consumer(bootstrap)
    try:
        (place,) = consumer.offsets_for_times([TopicPartition(topic, 0, at_ms)], timeout=timeout_s)
    except KafkaException as error:
        raise _unreadable(bootstrap, topic, error) from None
    finally:
        consumer.close()
    newest: dict[str, dict[str, Any]] = {}
    first = place.offset if place.offset >= 0 else ends[0]  # below 0: there is none
    for message in _read_to_end(bootstrap, topic, {0: first}, timeout_s, committed=False, ends=ends):
        key, value = (message.key() or b"").decode(errors="replace"), message.value()
        if not key.startswith(prefix):
            continue
        if value is None:
            newest.pop(key, None)
        elif (found := parse_object(value)) is not None:
            newest[key] = found
        else:
            _log.warning("topic %s, offset %s: record %s is no JSON object", topic, message.offset(), key)
    return newest


def newest_values(bootstrap: str, topic: str, partition: int, count: int, timeout_s: float) -> list[bytes | None]:
    """Values of the last ``count`` committed records of a partition, the last one first.

    A partition of which all records were deleted gives one None, one that never had any gives nothing. Waits for transactions that are
    open: behind one of somebody else there may be records that are committed already.

    Raises:
        BrokerUnavailableError: not within ``timeout_s`` seconds.
    """
    ends, found = _ends(bootstrap, topic, [partition]), []
    wait_until_seen(bootstrap, topic, ends, timeout_s)
    consumer = make_consumer(bootstrap)
    try:
        start, _ = watermark_offsets(consumer, topic, partition)
    finally:
        consumer.close()
    for froms in _further_back({partition: start}, ends, 4 * count):
        found = [message.value() for message in _read_to_end(bootstrap, topic, froms, timeout_s, ends=ends)]
        if len(found) >= count:
            break
    return found[: -count - 1 : -1] or [None] * (start > 0)


def oldest_values(bootstrap: str, topic: str, partition: int, count: int, timeout_s: float) -> list[bytes | None]:
    """Values of the first ``count`` committed records of a partition, in their order."""
    return [record.value for record in islice(read_topic_from(bootstrap, topic, partition, 0, timeout_s), count)]


def follow(
    bootstrap: str,
    topics: list[str],
    from_beginning: bool,
    stop: threading.Event,
    starts: Mapping[tuple[str, int], int] | None = None,
) -> Iterator[list[Record]]:
    """Committed records as they come, in lists (empty ones too, at least every half second), until ``stop`` is set.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topics: which topics.
        from_beginning: whether to begin at the first record, in place of at the end.
        stop: ends it.
        starts: where to begin instead, by topic and partition, unless that is gone.

    Raises:
        KafkaException: the broker cannot be reached, or a topic is missing.
    """
    consumer = make_consumer(bootstrap, fetch_wait_max_ms=FOLLOWED_MS)
    try:
        assigned = []
        for topic in topics:
            for partition in _known_partitions(consumer, topic):
                low, high = watermark_offsets(consumer, topic, partition)
                begin = (starts or {}).get((topic, partition), low if from_beginning else high)
                assigned.append(TopicPartition(topic, partition, min(max(begin, low), high)))
        consumer.assign(assigned)
        while not stop.is_set():
            batch = []
            for message in consumer.consume(5000, timeout=FILLED_S):
                error = message.error()
                if error is None:
                    batch.append(record_of(message))
                elif error.code() == KafkaError._PARTITION_EOF:
                    continue
                else:
                    raise KafkaException(error)
            yield batch
    finally:
        consumer.close()


class Backlog:
    """How far a reader is behind the end of a topic, asked for again and again.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topic: the topic.
        partitions: how many it has.
    """

    def __init__(self, bootstrap: str, topic: str, partitions: int) -> None:
        self._topic = topic
        self._partitions = partitions
        self._consumer = make_consumer(bootstrap)

    def behind(self, read: Mapping[int, int], timeout_s: float = 1.0) -> int:
        """Offsets that readers of committed records have not read: records, and a marker for each transaction of a partition.

        Args:
            read: by partition, the offset behind the last one read; none where nothing was read.
            timeout_s: how long a partition's leader may take, seconds.

        Raises:
            KafkaException: the broker does not answer.
        """
        behind = 0
        for partition in range(self._partitions):
            low, high = watermark_offsets(self._consumer, self._topic, partition, timeout_s)
            behind += max(0, high - max(low, read.get(partition, low)))
        return behind

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.close()


class LatestRecords:
    """The newest records of a topic, asked for again and again, whatever the rate at which they come.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topic: the topic.
        most_partitions: look at the first so many partitions only.
    """

    def __init__(self, bootstrap: str, topic: str, most_partitions: int = 16) -> None:
        self._topic = topic
        self._consumer = make_consumer(bootstrap, queued_max_messages_kbytes=1024, fetch_message_max_bytes=65_536)
        self._partitions = _known_partitions(self._consumer, topic)[:most_partitions]

    def read(self, count: int, timeout_s: float = 1.0) -> list[Record]:
        """At most ``count`` of the newest committed records, oldest first.

        Raises:
            KafkaException: the broker does not answer.
        """
        froms = []
        for p in self._partitions:
            low, high = watermark_offsets(self._consumer, self._topic, p, timeout_s)
            if high > low:
                # some offsets are those of transaction markers
                froms.append(TopicPartition(self._topic, p, max(low, high - 4 * count)))
        found: list[Record] = []
        left = {place.partition for place in froms}
        deadline = time.monotonic() + timeout_s
        self._consumer.assign(froms)
        while left and time.monotonic() < deadline:
            for message in self._consumer.consume(4 * count, timeout=0.02):
                error = message.error()
                if error is None:
                    found.append(record_of(message))
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(message.partition() or 0)
        self._consumer.assign([])
        return sorted(found, key=lambda r: r.timestamp_ms)[-count:]

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.close()


def held_up(bootstrap: str, topic: str, partitions: Iterable[int] | None = None) -> list[int]:
    """Partitions (of all, or of some) before whose end an open transaction holds readers of committed data up.

    Raises:
        BrokerUnavailableError: the topic cannot be read.
        KafkaException: the broker does not answer.
    """
    ends = _ends(bootstrap, topic, list(_partitions(bootstrap, topic) if partitions is None else partitions))
    consumer = make_consumer(bootstrap)
    try:
        return [p for p, end in ends.items() if watermark_offsets(consumer, topic, p)[1] < end]
    finally:
        consumer.close()


def wait_until_seen(bootstrap: str, topic: str, ends: Mapping[int, int], timeout_s: float) -> None:
    """Wait until readers of committed data get as far as an offset of each partition: no transaction before it is open.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topic: the topic.
        ends: by partition, the offset that must be reached (exclusive).
        timeout_s: how long to wait over all, seconds.

    Raises:
        BrokerUnavailableError: not within ``timeout_s`` seconds.
        KafkaException: the broker does not answer.
    """
    consumer = make_consumer(bootstrap)
    deadline = time.monotonic() + timeout_s
    try:
        for partition, end in ends.items():
            while watermark_offsets(consumer, topic, partition)[1] < end:
                if time.monotonic() > deadline:
                    raise BrokerUnavailableError(
                        problem=f"a transaction has been open in partition {partition} of topic {topic} for {timeout_s:.0f} s, "
                        "before records that are committed",
                        fix="End the producer that holds it; Kafka's kafka-transactions.sh names it and can abort it",
                    )
                time.sleep(_LOOK_AGAIN_S)
    finally:
        consumer.close()


def record_of(message: Message) -> Record:
    """A message that was read without an error."""
    key, (partition, offset) = message.key(), _place(message)
    return Record(
        message.topic() or "",
        partition,
        offset,
        key.decode(errors="replace") if key is not None else None,
        message.value(),
        message.timestamp()[1],
    )


def _place(message: Message) -> tuple[int, int]:
    """Partition and offset of a message that was read."""
    partition, offset = message.partition(), message.offset()
    assert partition is not None
    assert offset is not None
    return partition, offset


def _known_partitions(consumer: Consumer, topic: str) -> list[int]:
    metadata = consumer.list_topics(topic, timeout=15).topics[topic]
    if metadata.error is not None:
        raise KafkaException(metadata.error)
    return sorted(metadata.partitions)


def _partitions(bootstrap: str, topic: str) -> dict[int, int]:
    """Partitions of a topic, each with its first offset."""
    consumer = make_consumer(bootstrap)
    try:
        return {p: watermark_offsets(consumer, topic, p)[0] for p in _known_partitions(consumer, topic)}
    except KafkaException as error:
        raise _unreadable(bootstrap, topic, error) from None
    finally:
        consumer.close()


def _unreadable(bootstrap: str, topic: str, error: KafkaException) -> BrokerUnavailableError:
    cause: KafkaError = error.args[0]
    return error_of(
        BrokerUnavailableError,
        f"topic {topic} at {bootstrap} cannot be read ({cause.str()})",
        cause,
        "Check --bootstrap-servers, and that the pipeline has run",
    )


def _ends(bootstrap: str, topic: str, partitions: list[int]) -> dict[int, int]:
    """Where each partition ends, open transactions included.

    A reader of committed data is only told where the oldest open transaction begins, which may lie before records that
    are committed already.
    """
    consumer = make_consumer(bootstrap, isolation_level="read_uncommitted")
    try:
        return {p: watermark_offsets(consumer, topic, p)[1] for p in partitions}
    except KafkaException as error:
        raise _unreadable(bootstrap, topic, error) from None
    finally:
        consumer.close()


def _further_back(starts: dict[int, int], ends: dict[int, int], offsets: int) -> Iterator[dict[int, int]]:
    """Offsets to read from until enough is found: so many before the ends, then more and more, at last the starts.

    How many records lie behind an offset is not known before: markers of transactions and what was aborted take offsets too.
    """
    while True:
        froms = {p: max(start, ends[p] - offsets) for p, start in starts.items()}
        yield froms
        if froms == starts:
            return
        offsets *= 8


def _read_to_end(
    bootstrap: str,
    topic: str,
    froms: dict[int, int],
    timeout_s: float,
    committed: bool = True,
    ends: dict[int, int] | None = None,
) -> Iterator[Message]:
    """Committed records (or all) from some offsets up to ``ends``, or to where the partitions end now."""
    ends = ends or _ends(bootstrap, topic, list(froms))
    left = {p for p, first in froms.items() if first < ends[p]}
    isolation = "read_committed" if committed else "read_uncommitted"
    consumer = make_consumer(bootstrap, auto_offset_reset="earliest", isolation_level=isolation)
    deadline = time.monotonic() + timeout_s
    try:
        consumer.assign([TopicPartition(topic, p, froms[p]) for p in sorted(left)])
        while left:
            for message in consumer.consume(_AT_ONCE, timeout=FILLED_S):
                error = message.error()
                if error is None:
                    partition, offset = _place(message)
                    if partition in left and offset < ends[partition]:
                        yield message
                elif error.code() != KafkaError._PARTITION_EOF:
                    raise error_of(BrokerUnavailableError, f"reading topic {topic}: {error.str()}", error, "Try again")
            for place in consumer.position([TopicPartition(topic, p) for p in left]):
                if place.offset >= ends[place.partition]:
                    left.discard(place.partition)
            if left and time.monotonic() > deadline:
                raise BrokerUnavailableError(
                    problem=f"topic {topic} could not be read to its end within {timeout_s:.0f} s "
                    f"(partitions {sorted(left)} are left)",
                    fix="A transaction may be open; try again",
                )
    finally:
        consumer.close()


def _object_of(record: Record) -> dict[str, Any]:
    found = parse_object(record.value)
    if found is None:
        where = f"partition {record.partition}, offset {record.offset}"
        raise RecordError(
            problem=f"topic {record.topic}, {where}: record {record.key} is no JSON object",
            fix="Write the last true one under its key again, or delete it (a record of that key without a value)",
        )
    return found
