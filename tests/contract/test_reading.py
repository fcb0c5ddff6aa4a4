"""Topics read back: of each key the newest record counts, what somebody else wrote has a name, and how far a reader is behind."""

from __future__ import annotations

import json
import time

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]

from ray_pipeline.errors import RecordError
from ray_pipeline.kafka.client import make_admin, make_producer
from ray_pipeline.kafka.read import Backlog, Record, newest_records, newest_since, read_compacted
from tests.conftest import wait_for


def test_of_each_key_the_newest_counts_and_one_that_is_no_object_is_named(broker: str) -> None:
    topic, began_ms = "reading.newest", time.time_ns() // 1_000_000
    admin = make_admin(broker)  # its futures live as long as it does
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)
    producer = make_producer(broker)

    def write(key: str | None, value: bytes | None) -> None:
        producer.produce(topic, value, None if key is None else key.encode(), 0)
        assert not producer.flush(30)

    for key, value in (("a/1", {"n": 1}), ("a/2", {"n": 2}), ("a/1", {"n": 3}), ("b", {"n": 4}), ("c", {"n": 5})):
        write(key, json.dumps(value).encode())
    write("c", None)
    write(None, b"rubbish")
    assert read_compacted(broker, topic) == {"a/1": {"n": 3}, "a/2": {"n": 2}, "b": {"n": 4}}
    assert newest_since(broker, topic, "a/", began_ms, 30) == {"a/1": {"n": 3}, "a/2": {"n": 2}}

    write("a/2", b"[" * 100_000)
    with pytest.raises(RecordError, match="offset 7: record a/2 is no JSON object"):
        read_compacted(broker, topic)
    assert newest_since(broker, topic, "a/", began_ms, 30) == {"a/1": {"n": 3}, "a/2": {"n": 2}}
    each: list[Record] = []
    found = newest_records(broker, topic, each=each.append)
    assert {key: record.offset for key, record in found.items()} == {"a/1": 2, "a/2": 7, "b": 3}
    assert [(record.key, record.offset) for record in each] == [
        *(("a/1", 0), ("a/2", 1), ("a/1", 2), ("b", 3), ("c", 4), ("c", 5), ("a/2", 7))
    ]


def test_a_reader_is_as_far_behind_as_there_is_that_it_may_read(broker: str) -> None:
    topic = "reading.backlog"
    admin = make_admin(broker)  # its futures live as long as it does
    admin.create_topics([NewTopic(topic, 2, 1)])[topic].result(30)
    backlog = Backlog(broker, topic, 2)
    assert backlog.behind({}) == 0
    producer = make_producer(broker, transactional_id=topic)
    producer.init_transactions(30)
    for n, commit in enumerate((producer.commit_transaction, producer.abort_transaction)):
        producer.begin_transaction()
        for partition in (0, 0, 1):
            producer.produce(topic, b"{}", partition=partition)
        assert not producer.flush(30)
        assert backlog.behind({0: 3 * n, 1: 2 * n}) == 0  # it is not to be seen yet
        commit(30)
    wait_for("the end of both", lambda: backlog.behind({}) == 3 * 2 + 2 * 2, 20)
    assert backlog.behind({0: 3, 1: 1}) == 3 + 3
    assert backlog.behind({0: 6, 1: 4}) == 0
    with pytest.raises(KafkaException):
        Backlog("127.0.0.1:1", topic, 1).behind({}, 0.2)
    backlog.close()
