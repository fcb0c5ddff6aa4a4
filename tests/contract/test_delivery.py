"""What every delivery promises: the same suite over the one in memory and the real ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.config import load_settings
from ray_pipeline.delivery.factory import fallback, open_delivery
from ray_pipeline.delivery.interface import Epoch, ShardDelivery, ShardProgress
from ray_pipeline.delivery.memory import MemoryDelivery, MemoryLog
from ray_pipeline.errors import DeliveryError, FencedError
from ray_pipeline.events import EventBatch, Fault
from ray_pipeline.formats.factory import open_format
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.read import read_topic
from ray_pipeline.kafka.topics import ensure_topics

START_MS = 1_700_000_000_000


def batch(first: int, count: int) -> EventBatch:
    ids = np.arange(first + 1, first + 1 + count, dtype=np.int64)
    return EventBatch(0, first, ids, ids, (ids % 10 + 1).astype(np.uint8), START_MS + ids)


def progress(next_index: int) -> ShardProgress:
    return ShardProgress("run", "config", 0, next_index, START_MS, START_MS, (Epoch(START_MS, 12.5),), 0.25, 0.125)


@dataclass
class World:
    """A kind of delivery, and how to look at what readers see."""

    make: Callable[[], ShardDelivery]
    seen: Callable[[], list[tuple[bytes, bytes | None]]]
    exactly_once: bool
    contract_json: bool
    hold_up: Callable[[], Callable[[], None]]
    """Somebody else begins a transaction in the partition; calling what it returns ends it."""


WAYS: dict[str, dict[str, Any]] = {
    "exactly-once": {},
    "fast": {"fast": True},
    "at-least-once": {"delivery": "at-least-once"},
    "avro": {"format": "avro", "schema_registry_url": "mock://contract"},
    "protobuf": {"format": "protobuf", "schema_registry_url": "mock://contract"},
    "padded": {"field_names": "userId=user", "padding_bytes": 20, "delivery": "at-least-once"},
}


@pytest.fixture(params=["memory", *WAYS])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "memory":
        log = MemoryLog()

        def hold_memory_up() -> Callable[[], None]:
            log.held_up.add(0)
            return log.held_up.clear

        yield World(lambda: MemoryDelivery(log, 0), lambda: list(log.ratings[0]), True, True, hold_memory_up)
        return
    bootstrap: str = request.getfixturevalue("broker")
    name = f"contract-{request.param}-{abs(hash(request.node.nodeid)) % 10**8}"
    topics = {"ratings_topic": name, "progress_topic": f"{name}.progress"}
    settings = load_settings(partitions=1, actors=1, **topics, **WAYS[request.param])
    wire = open_format(settings)
    assert fallback(settings) is None
    ensure_topics(settings, bootstrap)

    def seen() -> list[tuple[bytes, bytes | None]]:
        records = list(read_topic(bootstrap, name))
        values = wire.from_wire([r.value for r in records])
        return [((r.key or "").encode(), value) for r, value in zip(records, values, strict=True)]

    def hold_up() -> Callable[[], None]:
        other = make_producer(bootstrap, transactional_id=f"{name}-other", transaction_timeout_ms=60_000)
        other.init_transactions(30)
        other.begin_transaction()
        other.produce(name, b"{}", b"1", 0)
        other.flush(30)
        return lambda: other.abort_transaction(30)

    exactly_once = settings.delivery == "exactly-once"
    yield World(lambda: open_delivery(settings, bootstrap, 0), seen, exactly_once, settings.plain_format, hold_up)


def expected(*batches: EventBatch) -> list[tuple[bytes, bytes | None]]:
    return [pair for b in batches for pair in zip(encode_keys(b), encode_values(b), strict=True)]


def test_records_that_are_broken_on_purpose_arrive_as_they_are(world: World) -> None:
    if not world.contract_json:
        pytest.skip("the settings refuse broken records in another format")
    faults = np.arange(500) % len(Fault)
    broken = replace(batch(0, 500), faults=faults.astype(np.uint8), details=np.arange(500, dtype=np.uint32) * 97)
    delivery = world.make()
    delivery.open(30)
    delivery.send(broken)
    delivery.commit(progress(500))
    delivery.close()
    again = world.make()
    again.open(30)
    assert again.newest(1, 30) == [None]  # the last one is a tombstone
    again.close()
    assert world.seen() == expected(broken)
    assert sum(value is None for _, value in world.seen()) == 50


def test_a_fresh_shard_has_no_progress_and_then_its_own(world: World) -> None:
    delivery = world.make()
    assert delivery.open(30) is None
    delivery.send(batch(0, 3))
    delivery.commit(progress(3))
    delivery.close()
    again = world.make()
    assert again.open(30) == progress(3)
    again.close()
    again.close()  # twice is once
    assert world.seen() == expected(batch(0, 3))


def test_order_is_that_of_sending_over_many_commits(world: World) -> None:
    delivery = world.make()
    delivery.open(30)
    parts = [batch(n * 500, 500) for n in range(20)]
    for n, part in enumerate(parts):
        delivery.send(part)
        delivery.commit(progress((n + 1) * 500))
    assert delivery.oldest(3, 30) == encode_values(batch(0, 3))
    assert delivery.newest(2, 30) == encode_values(batch(9998, 2))[::-1]
    delivery.close()
    assert world.seen() == expected(*parts)


def test_a_commit_without_ratings_moves_only_the_progress(world: World) -> None:
    delivery = world.make()
    delivery.open(30)
    delivery.commit(progress(0))
    delivery.confirm(progress(0), 30)
    delivery.close()
    again = world.make()
    assert again.open(30) == progress(0)
    again.close()
    assert world.seen() == []


def test_what_was_not_committed_is_not_seen(world: World) -> None:
    delivery = world.make()
    delivery.open(30)
    delivery.send(batch(0, 3))
    delivery.commit(progress(3))
    delivery.send(batch(3, 1000))
    delivery.close()
    again = world.make()
    assert again.open(30) == progress(3)
    again.send(batch(3, 2))
    again.commit(progress(5))
    again.close()
    if world.exactly_once:
        assert world.seen() == expected(batch(0, 3), batch(3, 2))
    else:  # it may be seen, and is sent again: repeats, no gaps
        assert set(world.seen()) >= set(expected(batch(0, 5)))


def test_a_successor_shuts_its_predecessor_out(world: World) -> None:
    first = world.make()
    first.open(30)
    first.send(batch(0, 3))
    second = world.make()
    assert second.open(30) is None
    if world.exactly_once:
        with pytest.raises(FencedError):
            first.send(batch(3, 1))
            first.commit(progress(4))
    second.send(batch(0, 1))
    second.commit(progress(1))
    first.close()
    second.close()
    if world.exactly_once:
        assert world.seen() == expected(batch(0, 1))
    else:
        # what the first had not sent yet when it was closed is dropped
        assert set(expected(batch(0, 1))) <= set(world.seen()) <= set(expected(batch(0, 3)))


def test_a_transaction_of_somebody_else_hides_no_rating_of_the_shard(world: World) -> None:
    """One that is killed leaves its transaction open for a while, and the shard goes on committing behind its beginning."""
    delivery = world.make()
    delivery.open(30)
    delivery.send(batch(0, 3))
    delivery.commit(progress(3))
    let_go = world.hold_up()
    delivery.send(batch(3, 200))
    delivery.commit(progress(203))
    delivery.close()
    again = world.make()
    assert again.open(30) == progress(203)
    with pytest.raises(DeliveryError, match="transaction has been open"):
        again.newest(1, 1)
    let_go()
    assert again.newest(1, 30) == encode_values(batch(202, 1))
    again.close()
    assert world.seen() == expected(batch(0, 203))


def test_one_that_was_shut_out_while_it_sent_learns_that_it_was(world: World) -> None:
    if not world.exactly_once:
        pytest.skip("without transactions nobody is shut out")
    first = world.make()
    first.open(30)
    first.send(batch(0, 3))
    world.make().open(30)
    deadline = time.monotonic() + 30
    with pytest.raises(FencedError):  # by the answer to what it sent, before any commit
        while time.monotonic() < deadline:
            first.send(batch(3, 1))
            time.sleep(0.05)
    first.close()
    assert world.seen() == []


def test_a_broker_that_is_away_is_an_error_in_time() -> None:
    settings = load_settings()
    delivery = open_delivery(settings, "127.0.0.1:1", 0)
    with pytest.raises(DeliveryError):
        delivery.open(2)
    delivery.close()
