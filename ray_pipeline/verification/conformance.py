"""Reads a run's ratings back for the conformance checks, with what the run published of itself."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json

from ray_pipeline.codec import decode_value
from ray_pipeline.config import Settings
from ray_pipeline.conformance.sample import Sample
from ray_pipeline.conformance.texts import classify
from ray_pipeline.conformance.world import World
from ray_pipeline.errors import UncheckedError
from ray_pipeline.events import Fault
from ray_pipeline.generator.plan import ShardSchedule
from ray_pipeline.kafka.read import Record, newest_of_key, read_topic
from ray_pipeline.verification.audit import PublishedRun, published_run
from ray_pipeline.verification.outside import own_records

__all__ = ["declared_world", "read_sample"]

_AT_ONCE = 50_000
_PROGRESS_S = 60.0
_FIELDS = ("userId", "movieId", "rating", "timestamp")
_SCHEMA = pa.schema(
    [("userId", pa.int64()), ("movieId", pa.int64()), ("rating", pa.float64()), ("timestamp", pa.int64())]
)


def read_sample(settings: Settings, bootstrap: str, most: int) -> Sample:
    """The ratings of a topic, in columns, and the world that the run declared.

    Args:
        settings: names the topics and the catalogue; the events are the run's own.
        bootstrap: brokers, HOST:PORT[,…].
        most: no more than so many records are read, the first ones of each partition.

    Raises:
        UncheckedError: there is no run, it cannot be regenerated here, or there is no rating.
        BrokerUnavailableError: a topic cannot be read.
    """
    run = published_run(settings, bootstrap).at_its_topics()
    every = read_topic(bootstrap, run.settings.ratings_topic)
    records = islice(own_records(run.settings, bootstrap, every), most)
    blocks, texts = _columns(records)
    if not blocks:
        raise UncheckedError(
            problem=f"topic {run.settings.ratings_topic} at {bootstrap} has no ratings", fix="Check --topic"
        )
    numbers = np.concatenate(blocks)
    # Kafka gives a partition's records in order, but partitions in any
    numbers = numbers[np.argsort(numbers["partition"], kind="stable")]
    world = declared_world(run, bootstrap)
    return Sample(
        numbers["partition"],
        numbers["index"],
        numbers["userId"],
        numbers["movieId"],
        numbers["half_stars"],
        numbers["timestamp"],
        whole=int(texts.sum()) == world.declared_total,
        source=world,
        unreadable=int(texts.sum()) - len(numbers),
        texts=texts,
    )


_COLUMNS = np.dtype(
    [
        ("partition", "i4"),
        ("index", "i8"),
        ("userId", "i8"),
        ("movieId", "i8"),
        ("half_stars", "u1"),
        ("timestamp", "i8"),
    ]
)


def _columns(records: Iterator[Record]) -> tuple[list[np.ndarray], np.ndarray]:
    """Blocks of ratings with their places, and how many records have which text, by :class:`Fault`."""
    places: dict[int, int] = {}
    blocks, counts = [], np.zeros(len(Fault), np.int64)
    while several := list(islice(records, _AT_ONCE)):
        block = np.empty(len(several), _COLUMNS)
        block["partition"] = [record.partition for record in several]
        for row, record in enumerate(several):
            block["index"][row] = places.get(record.partition, 0)
            places[record.partition] = places.get(record.partition, 0) + 1
        texts = _decode([record.value for record in several], block)
        counts += np.bincount(texts, minlength=len(Fault))
        blocks.append(block[texts < Fault.MALFORMED])
    return blocks, counts


def _decode(values: list[bytes | None], block: np.ndarray) -> np.ndarray:
    """Fill in the fields; returns what the text of each is, shape (n,)."""
    try:
        table = arrow_json.read_json(
            io.BytesIO(b"\n".join(value or b"" for value in values)),
            parse_options=arrow_json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="infer"),
        )
    except pa.ArrowInvalid:
        table = None
    if (
        table is not None
        and table.column_names == [*_FIELDS]
        and len(table) == len(values)
        and not any(c.null_count for c in table.columns)
    ):
        columns = {name: table[name].to_numpy() for name in _FIELDS}
        half_stars = columns["rating"] * 2
        if ((half_stars >= 1) & (half_stars <= 10) & (half_stars == np.floor(half_stars))).all():
            for name in ("userId", "movieId", "timestamp"):
                block[name] = columns[name]
            block["half_stars"] = half_stars
            return np.zeros(len(values), np.uint8)
    texts = classify(values)
    for row in np.flatnonzero(texts < Fault.MALFORMED).tolist():
        fields = decode_value(values[row])
        for name in ("userId", "movieId", "timestamp"):
            block[name][row] = fields[name]
        block["half_stars"][row] = fields["rating"] * 2
    return texts


def declared_world(run: PublishedRun, bootstrap: str) -> World:
    """The world of the run, with the plan as each shard lived it, and the end that it reached, if it was given one.

    Raises:
        UncheckedError: a shard has sent nothing yet.
    """
    schedules = {p: ShardSchedule.lived(s) for p, s in run.progress.items()}
    missing = sorted(set(range(run.settings.partitions)) - set(schedules))
    if missing:
        raise UncheckedError(
            problem=f"the shard of partition {missing[0]} has not said that it sent anything yet", fix="Try again later"
        )
    newest = newest_of_key(bootstrap, run.settings.progress_topic, "generator", _PROGRESS_S)
    said = json.loads(newest or b"{}")
    reached = said.get("state") == "stopped" and not said.get("base") and said.get("delivered") == said.get("requested")
    rates = [epoch.rate for progress in run.progress.values() for epoch in progress.epochs if epoch.rate > 0]
    lived = {
        "ratings": said["requested"] if reached else None,
        "duration_s": None,
        "rate": rates[-1] if rates else run.settings.rate,
    }
    return World(run.settings.model_copy(update=lived), schedules)
