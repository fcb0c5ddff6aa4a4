"""When delivery fails, nothing of the transaction is seen and the error says why; the same for both ways of sending.

Without transactions nothing is lost.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourceType,
)

from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery import columns, factory, outside, sending, transactional
from ray_pipeline.delivery.factory import open_delivery
from ray_pipeline.delivery.interface import ShardDelivery
from ray_pipeline.delivery.outside import OutsideDelivery
from ray_pipeline.errors import DeliveryError, FencedError, StateMismatchError
from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.client import make_admin, make_consumer, make_producer, watermark_offsets
from ray_pipeline.kafka.read import held_up, read_topic, wait_until_seen
from ray_pipeline.kafka.topics import ensure_topics
from tests.conftest import wait_for
from tests.contract.test_delivery import WAYS, batch, expected, progress


@dataclass
class Shard:
    """Shard 0 of a topic of its own, with ten ratings committed."""

    settings: Settings
    bootstrap: str

    def opened(self, next_index: int | None = 10) -> ShardDelivery:
        delivery = open_delivery(self.settings, self.bootstrap, 0)
        found = delivery.open(30)
        assert (found.next_index if found else None) == next_index
        return delivery

    def seen(self) -> list[tuple[bytes, bytes]]:
        topic = self.settings.ratings_topic
        return [((r.key or "").encode(), r.value or b"") for r in read_topic(self.bootstrap, topic)]

    def stable_end(self) -> int:
        """Where readers of committed data end: before the first open transaction."""
        consumer = make_consumer(self.bootstrap)
        try:
            return watermark_offsets(consumer, self.settings.ratings_topic, 0)[1]
        finally:
            consumer.close()

    def alter(self, name: str, value: str) -> None:
        resource = ConfigResource(ResourceType.TOPIC, self.settings.ratings_topic)
        resource.add_incremental_config(ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET))
        admin = make_admin(self.bootstrap)  # what was asked is given up when it goes
        for done in admin.incremental_alter_configs([resource]).values():
            done.result(15)

    def outside(self) -> OutsideDelivery:
        return OutsideDelivery(self.bootstrap, self.settings.ratings_topic, self.settings.outside_topic)

    def held_up(self) -> list[list[int]]:
        return [held_up(self.bootstrap, t) for t in (self.settings.ratings_topic, self.settings.outside_topic)]

    def add_partition(self) -> None:
        admin = make_admin(self.bootstrap)
        for done in admin.create_partitions([NewPartitions(self.settings.ratings_topic, 2)]).values():
            done.result(15)


@pytest.fixture(params=["plain", "fast"])
def shard(request: pytest.FixtureRequest, broker: str) -> Shard:
    name = f"failing-{abs(hash(request.node.nodeid)) % 10**8}"
    topics = {"ratings_topic": name, "progress_topic": f"{name}.progress", "outside_topic": f"{name}.outside"}
    settings = load_settings(partitions=1, actors=1, **topics, **WAYS.get(request.param, {}))
    assert factory.fallback(settings) is None
    ensure_topics(settings, broker)
    made = Shard(settings, broker)
    delivery = made.opened(None)
    delivery.send(batch(0, 10))
    delivery.commit(progress(10))
    delivery.close()
    return made


def test_a_record_that_the_broker_refuses_fails_the_commit_and_nothing_is_seen(shard: Shard) -> None:
    shard.alter("max.message.bytes", "100")  # the marker of an abort still fits
    delivery = shard.opened()
    with pytest.raises(DeliveryError):
        delivery.send(batch(10, 5))
        delivery.commit(progress(15))
    delivery.close()
    assert shard.seen() == expected(batch(0, 10))
    shard.alter("max.message.bytes", "1000000")
    again = shard.opened()
    again.send(batch(10, 5))
    again.commit(progress(15))
    again.close()
    assert shard.seen() == expected(batch(0, 15))


def test_order_holds_while_the_queue_is_full_again_and_again(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    class Counted(sending.QueueWait):
        def for_room(self) -> None:
            waits.append(1)
            super().for_room()

    for module in (sending, columns):
        monkeypatch.setattr(module, "QueueWait", Counted)
    small = partial(make_producer, queue_buffering_max_messages=700)
    monkeypatch.setattr(transactional, "make_producer", small)
    delivery = shard.opened()
    delivery.send(batch(10, 8000))
    delivery.send(batch(8010, 1))
    delivery.commit(progress(8011))
    delivery.close()
    assert len(waits) >= 8000 // 700
    assert shard.seen() == expected(batch(0, 8011))


def test_a_queue_that_stays_full_is_an_error_in_time(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(make_producer, queue_buffering_max_messages=100)
    monkeypatch.setattr(transactional, "make_producer", small)
    monkeypatch.setattr(transactional, "_LINGER_MS", 5000)
    monkeypatch.setattr(sending, "_SEND_DEADLINE_S", 0.3)
    delivery = shard.opened()
    with pytest.raises(DeliveryError, match="queue stayed full"):
        delivery.send(batch(10, 101))
    delivery.close()
    assert shard.seen() == expected(batch(0, 10))


def test_a_commit_is_confirmed_when_readers_see_it_and_not_before(shard: Shard) -> None:
    """A broker killed right after it answered a commit may leave the transaction open: here one of somebody else's is."""
    delivery, topic = shard.opened(), shard.settings.progress_topic
    other = make_producer(shard.bootstrap, transactional_id=f"{topic}-other", transaction_timeout_ms=60_000)
    other.init_transactions(30)
    other.begin_transaction()
    other.produce(topic, b"{}", b"shard/9", 0)
    other.flush(30)
    delivery.commit(progress(11))
    with pytest.raises(DeliveryError, match="could not be read to its end"):
        delivery.confirm(progress(11), 1)
    other.abort_transaction(30)
    delivery.confirm(progress(11), 30)
    with pytest.raises(DeliveryError, match="took a commit back"):
        delivery.confirm(progress(12), 30)
    delivery.close()


@pytest.mark.parametrize("shard", ["plain"], indirect=True)  # posted ratings know one way
def test_what_a_killed_writer_of_posted_ratings_left_open_is_ended_by_the_next_one(shard: Shard) -> None:
    topic = shard.settings.ratings_topic
    killed = make_producer(shard.bootstrap, transactional_id=f"{topic}-outside", transaction_timeout_ms=300_000)
    killed.init_transactions(30)
    killed.begin_transaction()
    for row in expected(batch(10, 5)):
        killed.produce(topic, row[1], row[0], 0)
    killed.flush(30)
    assert shard.held_up() == [[0], []]
    delivery = shard.outside()
    delivery.deliver(batch(500, 3))
    assert shard.held_up() == [[], []]
    delivery.close()
    assert shard.seen() == expected(batch(0, 10), batch(500, 3))


def test_another_number_of_partitions_is_refused_at_the_start(shard: Shard) -> None:
    shard.add_partition()
    delivery = open_delivery(shard.settings, shard.bootstrap, 0)
    with pytest.raises(StateMismatchError, match=r"has 2 partitions now.*made for 1"):
        delivery.open(30)
    delivery.close()


def test_partitions_that_are_added_are_noticed_before_the_next_commit(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_CHECK_EVERY_S", 0.0)
    delivery = shard.opened()
    shard.add_partition()
    with pytest.raises(StateMismatchError, match="reset"):
        delivery.send(batch(10, 5))
        delivery.commit(progress(15))
    delivery.close()
    assert shard.seen() == expected(batch(0, 10))


def test_a_topic_that_is_gone_is_an_error(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_CHECK_EVERY_S", 0.0)
    delivery = shard.opened()
    admin = make_admin(shard.bootstrap)
    for done in admin.delete_topics([shard.settings.ratings_topic]).values():
        done.result(15)
    with pytest.raises(DeliveryError):
        delivery.send(batch(10, 5))
        delivery.commit(progress(15))
    delivery.close()


def test_a_transaction_that_the_broker_gave_up_is_fenced_and_can_be_begun_again(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactional, "TRANSACTION_TIMEOUT_MS", 1000)
    delivery = shard.opened()
    before = shard.stable_end()
    delivery.send(batch(10, 5))
    # readers are let past the open transaction: its ratings and a marker
    wait_for("the broker gives the transaction up", lambda: shard.stable_end() == before + 5 + 1)
    with pytest.raises(FencedError):
        delivery.send(batch(15, 5))
        delivery.commit(progress(20))
    delivery.close()
    again = shard.opened()
    again.send(batch(10, 5))
    again.commit(progress(15))
    again.close()
    assert shard.seen() == expected(batch(0, 15))


def test_a_commit_whose_answer_was_not_waited_for_is_done_or_not_and_the_next_open_knows(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = 10
    for deadline_ms in range(1, 21):
        delivery = shard.opened(at)
        delivery.send(batch(at, 50))
        with monkeypatch.context() as impatient:
            impatient.setattr(transactional, "_COMMIT_DEADLINE_S", deadline_ms / 1000)
            try:
                delivery.commit(progress(at + 50))
            except DeliveryError:
                unknown = True
            else:
                unknown = False
        delivery.close()
        after = open_delivery(shard.settings, shard.bootstrap, 0)
        found = after.open(30)
        after.close()
        assert found is not None
        assert found.next_index in ((at, at + 50) if unknown else (at + 50,))
        at = found.next_index
    assert shard.seen() == expected(batch(0, at))


SENDS_FOR_EVER = """
import sys
from ray_pipeline.config import load_settings
from ray_pipeline.delivery.factory import open_delivery
from tests.contract.test_delivery import batch, progress

topic, bootstrap, fast, way = sys.argv[1:]
topics = {"ratings_topic": topic, "progress_topic": f"{topic}.progress"}
settings = load_settings(partitions=1, actors=1, fast=fast, delivery=way, **topics)
delivery = open_delivery(settings, bootstrap, 0)
at = delivery.open(30).next_index
print(at, flush=True)
while True:
    delivery.send(batch(at, 200))
    delivery.commit(progress(at + 200))
    at += 200
    print(at, flush=True)
"""


def said_until_killed(shard: Shard, number: int) -> tuple[int, int]:
    """Where one that sends for ever began, and the last commit that it told of before its SIGKILL."""
    settings = shard.settings
    given = (settings.ratings_topic, shard.bootstrap, str(settings.fast), settings.delivery)
    command = [sys.executable, "-c", SENDS_FOR_EVER, *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(4 + number)]
        time.sleep(random.Random(number).random() / 50)
        process.kill()
    return said[0], said[-1]


def test_sigkill_at_any_moment_loses_and_repeats_nothing(shard: Shard) -> None:
    at = 10
    for number in range(4):
        _, said = said_until_killed(shard, number)
        delivery = open_delivery(shard.settings, shard.bootstrap, 0)
        found = delivery.open(30)
        delivery.close()
        assert found is not None
        assert found.next_index >= said > at
        at = found.next_index
        assert shard.seen() == expected(batch(0, at))


def test_sigkill_of_the_broker_loses_and_repeats_nothing(shard: Shard, tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path)
    broker.start()
    try:
        shard = Shard(shard.settings, broker.bootstrap_servers)
        ensure_topics(shard.settings, shard.bootstrap)
        at, next_index = 0, None
        for ratings in (3000, 0):  # in the last commit; 0 = progress alone
            delivery = shard.opened(next_index)
            if ratings:
                delivery.send(batch(at, ratings))
            delivery.commit(progress(at + ratings))
            delivery.send(batch(at + ratings, 1000))
            broker.kill()
            broker.start()
            assert broker.bootstrap_servers == shard.bootstrap
            delivery.close()
            again = open_delivery(shard.settings, shard.bootstrap, 0)
            found = again.open(30)
            newest = again.newest(3, 30)
            again.close()
            # a commit of the broker's last moment may be taken back, ratings and progress each whole, before anybody saw it:
            # so the shard asks for both
            known, next_index = next_index or 0, found.next_index if found else None
            seen = shard.seen()
            assert len(seen) in (at, at + ratings) and (next_index or 0) in (known, at + ratings)
            at = len(seen)
            assert seen == expected(batch(0, at)) and newest == [value for _, value in seen[:-4:-1]]
        delivery = shard.opened(next_index)
        delivery.send(batch(at, 10))
        delivery.commit(progress(at + 10))
        delivery.close()
        assert shard.seen() == expected(batch(0, at + 10))
    finally:
        broker.stop()


def end_without_a_gap(shard: Shard, begun: Iterable[int]) -> int:
    """How many ratings the partition holds, each at least once, with repeats only of what came after a progress record.

    Args:
        shard: whose partition it is.
        begun: what the progress record said whenever a sender was opened.
    """
    seen = shard.seen()
    end, earlier = 0, iter(begun)
    while seen:
        # up to the first one that does not follow the one before it
        rows = expected(batch(end, len(seen)))
        same = next((n for n, (one, other) in enumerate(zip(seen, rows, strict=True)) if one != other), len(seen))
        del seen[:same]
        end += same
        if not seen:
            break
        again = int(seen[0][0]) - 1
        assert again < end, f"rating {again} follows rating {end - 1}"
        assert again in earlier, f"rating {again} is there again, and no sender began with it"
        end = again
    return end


@pytest.mark.parametrize("shard", ["at-least-once"], indirect=True)
def test_sigkill_at_any_moment_loses_nothing_at_least_once(shard: Shard) -> None:
    begun, said = list[int](), 10
    for number in range(4):
        before = said
        began, said = said_until_killed(shard, number)
        assert said > began >= before
        begun.append(began)
    delivery = open_delivery(shard.settings, shard.bootstrap, 0)
    found = delivery.open(30)
    assert found is not None
    assert found.next_index >= said
    end = found.next_index + 50_000  # more than any of them can have sent behind it
    delivery.send(batch(found.next_index, 50_000))
    delivery.commit(progress(end))
    delivery.close()
    assert end_without_a_gap(shard, [*begun, found.next_index]) == end


@pytest.mark.parametrize("shard", ["at-least-once"], indirect=True)
def test_sigkill_of_the_broker_loses_nothing_at_least_once(shard: Shard, tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path)
    broker.start()
    try:
        shard = Shard(shard.settings, broker.bootstrap_servers)
        ensure_topics(shard.settings, shard.bootstrap)
        begun = (0, 3000, 6000)
        for at in begun:
            delivery = shard.opened(at or None)
            delivery.send(batch(at, 3000))
            delivery.commit(progress(at + 3000))
            delivery.send(batch(at + 3000, 1000))
            if at < begun[-1]:
                time.sleep(random.Random(at).random() / 10)  # some of them are there by then, or all
                broker.kill()
                broker.start()
                assert broker.bootstrap_servers == shard.bootstrap
            else:
                delivery.commit(progress(at + 4000))
            delivery.close()
        assert end_without_a_gap(shard, begun) == begun[-1] + 4000
    finally:
        broker.stop()


@pytest.mark.parametrize("shard", ["plain"], indirect=True)  # posted ratings know one way
def test_sigkill_of_the_broker_when_it_answered_the_commit_of_posted_ratings_holds_no_reader_up(
    shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = EmbeddedBroker(tmp_path)
    broker.start()

    def killed_before(*place: Any) -> None:
        monkeypatch.setattr(outside, "wait_until_seen", wait_until_seen)
        broker.kill()
        broker.start()
        wait_until_seen(*place[:-1], 3)

    try:
        shard = Shard(shard.settings, broker.bootstrap_servers)
        ensure_topics(shard.settings, shard.bootstrap)
        delivery = shard.outside()
        for first in (500, 600, 700):
            monkeypatch.setattr(outside, "wait_until_seen", killed_before)
            try:
                delivery.deliver(batch(first, 3))
            except DeliveryError:  # it forgot to end the transaction
                delivery.deliver(batch(first, 3))
            assert shard.held_up() == [[], []]
        delivery.close()
    finally:
        broker.stop()
