"""One generator on real Ray and Kafka, scaled, stopped and killed under load: every partition stays what is regenerated."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.delivery.transactional import TRANSACTION_TIMEOUT_MS
from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.read import newest_of_key, read_compacted, read_topic
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.truth.replay import ShardReplay, build_models
from tests.conftest import Running, command, wait_for

pytestmark = pytest.mark.timeout(300)

RATE = 400
PARTITIONS = 9  # more than a local Ray on two cores has room for actors
EVENTS = ("--partitions", str(PARTITIONS), "--users", "2000", "--movies", "500")
LONGER_THAN_A_TRANSACTION_S = TRANSACTION_TIMEOUT_MS / 1000 + 6  # the broker looks every 5 s


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(partitions=PARTITIONS, users=2000, movies=500)


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """A broker of its own: it is stopped and killed."""
    broker = EmbeddedBroker(tmp_path_factory.mktemp("faults"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def generator(kafka: EmbeddedBroker, starter: Callable[..., Running]) -> Iterator[Running]:
    flags = ("--rate", str(RATE), "--actors", "1", "--commit-interval-ms", "200", *EVENTS)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(
        0, sorted(cores)[:2]
    )  # so that a Ray of its own has no room for an actor a partition, on any machine
    try:
        running = starter("generate", "--bootstrap-servers", kafka.bootstrap_servers, *flags)
    finally:
        os.sched_setaffinity(0, cores)
    running.info()
    yield running
    running.kill()


def status(kafka: EmbeddedBroker) -> dict[str, Any]:
    value = newest_of_key(kafka.bootstrap_servers, "ratings.progress", "generator", 60)
    return dict(json.loads(value)) if value else {}


def actor_pids(kafka: EmbeddedBroker) -> list[int]:
    return [actor["pid"] for actor in status(kafka)["actors"]]


def delivers(generator: Running, kafka: EmbeddedBroker, deadline_s: float = 60) -> None:
    """Wait until all that is due is delivered, by actors that are all alive."""

    def caught_up() -> bool:
        assert generator.process.poll() is None, generator.text
        found = status(kafka)
        fresh = time.time() * 1000 - found["updated_ms"] < 3_000
        return bool(fresh and found["behind_s"] < 1 and all(actor["alive"] for actor in found["actors"]))

    began = status(kafka)["delivered"]
    wait_for("ratings at the rate that is set", caught_up, deadline_s)
    wait_for("more ratings", lambda: status(kafka)["delivered"] > began + RATE, 30)


def check_every_partition(kafka: EmbeddedBroker, settings: Settings) -> int:
    """What is committed is what is regenerated, byte for byte, each rating once; returns how many there are."""
    progress = read_compacted(kafka.bootstrap_servers, "ratings.progress")
    found: dict[int, list[tuple[bytes, bytes]]] = defaultdict(list)
    for record in read_topic(kafka.bootstrap_servers, "ratings"):
        found[record.partition].append(((record.key or "").encode(), record.value or b""))
    for partition, model in build_models(settings, load_catalogue(settings), range(PARTITIONS)).items():
        mine = ShardProgress.from_json(json.dumps(progress[f"shard/{partition}"]).encode())
        events = ShardReplay(model, mine).events(0, mine.next_index)
        expected = list(zip(encode_keys(events), encode_values(events), strict=True))
        assert len(expected) > 0
        # a run that goes on may have committed more since
        assert found[partition][: len(expected)] == expected, f"partition {partition}"
    return sum(len(records) for records in found.values())


def test_it_is_scaled_under_load(generator: Running, kafka: EmbeddedBroker, settings: Settings) -> None:
    there = ("--bootstrap-servers", kafka.bootstrap_servers)
    for actors in (3, 2):
        done = command("scale", str(actors), "--json", *there)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["actors"] == actors
        found = status(kafka)["actors"]
        assert sorted(p for actor in found for p in actor["partitions"]) == list(range(PARTITIONS))
        assert [actor["partitions"] for actor in found] == [list(range(n, PARTITIONS, actors)) for n in range(actors)]
        delivers(generator, kafka)
    check_every_partition(kafka, settings)


def test_a_number_of_actors_that_cannot_be_is_refused_with_the_reason(
    generator: Running, kafka: EmbeddedBroker
) -> None:
    there = ("--bootstrap-servers", kafka.bootstrap_servers)
    assert command("scale", "0", *there).returncode == 2
    done = command("scale", str(PARTITIONS + 1), *there)
    assert done.returncode == 2 and f"from 1 to {PARTITIONS}" in done.stderr
    done = command("scale", str(PARTITIONS), *there)
    assert done.returncode == 2 and "more CPUs" in done.stderr and "go on" in done.stderr
    assert len(status(kafka)["actors"]) == 2


def test_an_actor_that_stood_still_is_fenced_and_begins_again(
    generator: Running, kafka: EmbeddedBroker, settings: Settings
) -> None:
    pid = actor_pids(kafka)[0]
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(LONGER_THAN_A_TRANSACTION_S)
        found = status(kafka)
        assert [actor["alive"] for actor in found["actors"]] == [False, True]
        # what it is told meanwhile it lives late
        done = command("rate", str(2 * RATE), "--bootstrap-servers", kafka.bootstrap_servers)
        assert done.returncode == 0, done.stderr
    finally:
        os.kill(pid, signal.SIGCONT)
    delivers(generator, kafka)
    assert actor_pids(kafka)[0] == pid  # the same process
    wait_for("its fencing in the output", lambda: "begins again from its last commit" in generator.text, 10)
    os.kill(pid, signal.SIGKILL)
    wait_for("a new process", lambda: actor_pids(kafka)[0] != pid, 60)
    delivers(generator, kafka)
    check_every_partition(kafka, settings)


def test_an_actor_that_stands_still_does_not_hold_up_its_successors(
    generator: Running, kafka: EmbeddedBroker, settings: Settings
) -> None:
    pid = actor_pids(kafka)[1]
    os.kill(pid, signal.SIGSTOP)
    try:
        done = command("scale", "1", "--bootstrap-servers", kafka.bootstrap_servers)
        assert done.returncode == 0, done.stderr
        wait_for("its end", lambda: not os.path.exists(f"/proc/{pid}"), 60)
    finally:
        if os.path.exists(f"/proc/{pid}"):
            os.kill(pid, signal.SIGCONT)
    delivers(generator, kafka)
    assert "does not let go of partition 1" in generator.text
    check_every_partition(kafka, settings)


def test_a_broker_that_stood_still_or_died_loses_and_repeats_nothing(
    generator: Running, kafka: EmbeddedBroker, settings: Settings
) -> None:
    assert kafka.pid is not None
    os.kill(kafka.pid, signal.SIGSTOP)
    try:
        time.sleep(LONGER_THAN_A_TRANSACTION_S)
    finally:
        os.kill(kafka.pid, signal.SIGCONT)
    delivers(generator, kafka, 90)
    kafka.kill()
    time.sleep(1)
    kafka.start()
    delivers(generator, kafka, 90)
    check_every_partition(kafka, settings)


def test_it_ends_in_order_with_every_rating_once(generator: Running, kafka: EmbeddedBroker, settings: Settings) -> None:
    assert generator.end() == 0, generator.text
    total = check_every_partition(kafka, settings)
    assert total == sum(
        read_compacted(kafka.bootstrap_servers, "ratings.progress")[f"shard/{p}"]["next_index"]
        for p in range(PARTITIONS)
    )
    assert status(kafka)["delivered"] == total
