"""Delivery by columns: what is checked before it is used, each way in which that can fail, and what only it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import confluent_kafka
import numpy as np
import pytest
from confluent_kafka import Producer

from ray_pipeline.clock import FakeClock
from ray_pipeline.cluster import fleet, membership
from ray_pipeline.cluster.files import SharedFiles
from ray_pipeline.codec import TextColumn
from ray_pipeline.config import load_settings
from ray_pipeline.delivery import columns, factory, librdkafka
from ray_pipeline.delivery.factory import fallback, open_delivery
from ray_pipeline.delivery.librdkafka import MESSAGE, obstacle
from ray_pipeline.errors import DeliveryError
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.placement import Placement
from ray_pipeline.kafka.read import read_topic
from ray_pipeline.kafka.topics import ensure_topics
from tests.contract.test_delivery import batch, expected, progress


@pytest.fixture(autouse=True)
def checked_anew() -> Iterator[None]:
    factory._fallback.cache_clear()
    yield
    factory._fallback.cache_clear()


def test_it_is_possible_with_the_versions_this_project_pins() -> None:
    assert obstacle() is None


def moved(**places: int) -> np.dtype[np.void]:
    """The layout of a message, with fields in other places."""
    names = list(MESSAGE.names or ())
    fields = {name: MESSAGE.fields[name] for name in names}  # type: ignore[index]
    return np.dtype(
        {
            "names": names,
            "formats": [fields[name][0] for name in names],
            "offsets": [places.get(name, fields[name][1]) for name in names],
            "itemsize": MESSAGE.itemsize,
        }
    )


def test_untried_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confluent_kafka, "version", lambda: "2.99.0")
    assert obstacle() == "confluent-kafka 2.99.0 with librdkafka 2.16.0 was not tried"


def test_a_missing_function(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {**librdkafka._FUNCTIONS, "rd_kafka_produce_crate": (None, ())}
    monkeypatch.setattr(librdkafka, "_FUNCTIONS", functions)
    assert obstacle() == "rd_kafka_produce_crate is not among the functions of librdkafka"


def test_functions_of_another_copy_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confluent_kafka, "libversion", lambda: ("2.16.0", 0x02100001))
    assert "another librdkafka" in str(obstacle())


def test_a_handle_that_is_not_the_producers(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Producer({"log_level": 0})
    there = librdkafka._first_field(other)
    monkeypatch.setattr(librdkafka, "_first_field", lambda _: there)
    assert "belongs to another object" in str(obstacle())
    monkeypatch.setattr(librdkafka, "_first_field", lambda _: None)
    assert obstacle() == "the producer has no handle"


@pytest.mark.parametrize(
    "places", [{"len": 40, "key": 32}, {"key_len": 56, "offset": 48}, {"partition": 4}, {"private": 56}, {"err": 16}]
)
def test_a_message_laid_out_otherwise(monkeypatch: pytest.MonkeyPatch, places: dict[str, int]) -> None:
    monkeypatch.setattr(librdkafka, "MESSAGE", moved(**places))
    assert obstacle() == "the fields of a message are not where they were expected"


def test_what_is_impossible_is_said_once_and_delivered_plainly(
    broker: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(librdkafka, "TRIED", frozenset())
    name = "fast-not-possible"
    settings = load_settings(partitions=1, actors=1, fast=True, ratings_topic=name, progress_topic=f"{name}.progress")
    ensure_topics(settings, broker)
    with caplog.at_level(logging.WARNING, "ray_pipeline.delivery"):
        for first in (0, 5):
            delivery = open_delivery(settings, broker, 0)
            delivery.open(30)
            delivery.send(batch(first, 5))
            delivery.commit(progress(first + 5))
            delivery.close()
    said = [r.getMessage() for r in caplog.records if "fast delivery" in r.getMessage()]
    assert said == [fallback(settings)]
    assert said[0].startswith("fast delivery is not possible here: confluent-kafka ")
    assert said[0].endswith("was not tried; plain delivery is used")
    assert [(r.key or "").encode() for r in read_topic(broker, name)] == [key for key, _ in expected(batch(0, 10))]


class RayHere:
    """Actors that are made in this process and answer at once."""

    @staticmethod
    def remote(**_: Any) -> Callable[[type], Any]:
        def make(kind: type) -> Callable[..., Any]:
            return lambda *arguments: _Handle(kind(*arguments))

        return lambda kind: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make(kind)))

    @staticmethod
    def wait(references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references, []

    @staticmethod
    def get(reference: Any) -> Any:
        return reference

    @staticmethod
    def get_runtime_context() -> Any:
        return SimpleNamespace(get_node_id=lambda: "here", get_assigned_resources=lambda: {"CPU": 0.25})


class _Handle:
    def __init__(self, actor: Any) -> None:
        self.exchange = SimpleNamespace(remote=actor.exchange)


@pytest.mark.parametrize("possible", [True, False])
def test_the_generator_tells_once_that_its_actors_cannot_do_it(monkeypatch: pytest.MonkeyPatch, possible: bool) -> None:
    if not possible:
        monkeypatch.setattr(librdkafka, "TRIED", frozenset())
    monkeypatch.setattr(fleet, "ray", RayHere)
    monkeypatch.setattr(membership, "ray", RayHere)
    settings = load_settings(users=100, movies=50, fast=True)
    events: list[str] = []
    owner = membership.Owner("fast", ("generate",), "", "here", 1, 0.0, has_ray=False)
    no_movies: Any = SimpleNamespace(get=lambda: None)  # an actor without partitions needs none
    actors = fleet.Fleet(
        settings, owner, no_movies, SharedFiles(), Placement(partitions=0, actors=1), FakeClock(), events.append
    )
    actors.grow(2)
    for _ in range(2):
        actors.exchange({}, stop=False)
    assert actors.all_heard and events == ([] if possible else [fallback(settings)])


def test_a_record_that_the_producer_refuses_is_an_error_and_nothing_is_seen(
    broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "fast-refused"
    settings = load_settings(partitions=1, actors=1, fast=True, ratings_topic=name, progress_topic=f"{name}.progress")
    ensure_topics(settings, broker)
    encode = columns.encode_columns

    def with_a_giant(ratings: EventBatch) -> tuple[TextColumn, TextColumn]:
        keys, values = encode(ratings)
        giant = np.full(2_000_000, ord("x"), np.uint8)
        offsets = values.offsets.copy()
        offsets[3:] += len(giant)
        data = np.insert(values.data, values.offsets[2], giant)
        return keys, TextColumn(data, offsets)

    monkeypatch.setattr(columns, "encode_columns", with_a_giant)
    delivery = open_delivery(settings, broker, 0)
    delivery.open(30)
    with pytest.raises(DeliveryError, match="Message size too large"):
        delivery.send(batch(0, 5))
    delivery.close()
    monkeypatch.undo()
    again = open_delivery(settings, broker, 0)
    assert again.open(30) is None
    again.send(batch(0, 5))
    again.commit(progress(5))
    again.close()
    assert [(r.key or "").encode() for r in read_topic(broker, name)] == [key for key, _ in expected(batch(0, 5))]
