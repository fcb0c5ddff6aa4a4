"""Sinks besides Kafka: the same ratings in one order, and a file that is whole or not there."""

from __future__ import annotations

import errno
import io
import json
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_pipeline.clock import FakeClock
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.memory import MemoryDelivery, MemoryLog
from ray_pipeline.errors import ConfigurationError, DeliveryError
from ray_pipeline.generator.coordination import Coordinator
from ray_pipeline.generator.runner import ShardRunner
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.partitioner import partition_of
from ray_pipeline.model.population import build_movies, build_user_map, build_users
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.pipeline import Pipeline
from ray_pipeline.restart import RestartPolicy
from ray_pipeline.sinks.writing import write_ratings

START_MS = 1_700_000_000_000
SMALL: dict[str, Any] = {"users": 300, "movies": 100, "rate": 5000.0, "start_time_ms": START_MS}


def written(settings: Settings, clock: FakeClock | None = None) -> list[bytes]:
    stream = io.BytesIO()
    summary = write_ratings(settings, stream, clock=clock or FakeClock())
    lines = stream.getvalue().splitlines()
    assert summary.delivered == len(lines)
    return lines


def by_partition(lines: list[bytes], partitions: int = 4) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = defaultdict(list)
    users = np.array([json.loads(line)["userId"] for line in lines], np.int64)
    for line, partition in zip(lines, partition_of(users, partitions).tolist(), strict=True):
        found[partition].append(line)
    return dict(found)


def delivered(settings: Settings) -> dict[int, list[bytes]]:
    """What the shards of a run deliver, by partition."""
    clock, log, catalogue, user_map = FakeClock(), MemoryLog(), load_catalogue(settings), build_user_map(settings)
    movies, partitions = build_movies(settings, catalogue), range(settings.partitions)

    def model(partition: int) -> ShardModel:
        return ShardModel(settings, partition, build_users(settings, user_map.users_of(partition)), movies)

    def runner(p: int) -> ShardRunner:
        return ShardRunner(p, lambda: model(p), lambda: MemoryDelivery(log, p), 100, clock, RestartPolicy())

    coordinator = Coordinator(settings, settings.digest(catalogue.digest), [user_map.share(p) for p in partitions])
    runners = [runner(p) for p in partitions]
    while not coordinator.totals().finished:
        for one in runners:
            one.step()
        coordinator.observe([one.report() for one in runners])
        for p, assignment in coordinator.assignments(clock.now_ms()).items():
            runners[p].tell(assignment)
        clock.advance(0.05)
    return {p: [value for _, value in log.ratings[p]] for p in partitions}


@pytest.mark.parametrize("end", [{"ratings": 7001}, {"duration_s": 1.25}])
def test_a_sink_gets_the_bytes_that_kafka_gets(end: dict[str, Any]) -> None:
    settings = load_settings(**SMALL, **end)
    found = by_partition(written(settings.model_copy(update={"sink": "stdout"})))
    assert found == delivered(settings)


def test_ratings_stand_in_the_order_in_which_they_are_due() -> None:
    lines = written(load_settings(**SMALL, sink="stdout", ratings=20_000))
    rows = [json.loads(line) for line in lines]
    users = np.array([row["userId"] for row in rows], np.int64)
    places = [(row["timestamp"], p) for row, p in zip(rows, partition_of(users, 4).tolist(), strict=True)]
    assert places == sorted(places)
    assert len(lines) == 20_000


@pytest.mark.parametrize("changes", [{"partitions": 1, "actors": 1}, {"partitions": 16, "rate": 1e5}, {"rate": 1e9}])
def test_every_rating_asked_for_is_written_once(changes: dict[str, Any]) -> None:
    settings = load_settings(**{**SMALL, **changes}, sink="stdout", ratings=200_000)
    lines = written(settings)
    assert len(lines) == 200_000
    parts = by_partition(lines, settings.partitions)
    for partition, expected in delivered(settings).items():
        assert parts[partition] == expected


def test_a_file_is_the_same_each_time(tmp_path: Path) -> None:
    contents = []
    for kind in ("ndjson", "parquet"):
        for n in (1, 2):
            path = tmp_path / f"{n}.{kind}"
            summary = write_ratings(load_settings(**SMALL, sink=kind, output=path, ratings=5000), clock=FakeClock(n))
            assert (summary.requested, summary.delivered, summary.output) == (5000, 5000, str(path))
            contents.append(path.read_bytes())
    assert contents[0] == contents[1] and contents[2] == contents[3]
    assert contents[0].splitlines() == written(load_settings(**SMALL, sink="stdout", ratings=5000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.ndjson", "1.parquet", "2.ndjson", "2.parquet"]


def test_parquet_has_typed_columns_with_the_place_of_each_rating(tmp_path: Path) -> None:
    path = tmp_path / "ratings.parquet"
    write_ratings(load_settings(**SMALL, sink="parquet", output=path, ratings=3000))
    table = pq.read_table(path)
    assert {f.name: f.type for f in table.schema} == {
        "partition": pa.int32(),
        "index": pa.int64(),
        "user_id": pa.int64(),
        "movie_id": pa.int64(),
        "rating": pa.float64(),
        "timestamp": pa.timestamp("ms", "UTC"),
    }
    rows = table.set_column(5, "timestamp", table["timestamp"].cast(pa.int64())).to_pylist()
    lines = [json.loads(line) for line in written(load_settings(**SMALL, sink="stdout", ratings=3000))]
    names = {"user_id": "userId", "movie_id": "movieId", "rating": "rating", "timestamp": "timestamp"}
    assert [{names[n]: row[n] for n in names} for row in rows] == lines
    for partition in range(4):
        indexes = [row["index"] for row in rows if row["partition"] == partition]
        assert indexes == list(range(len(indexes))) and indexes


class Timed(io.BytesIO):
    """Notes when each line was written."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock
        self.at_ms: list[int] = []

    def write(self, data: Any) -> int:
        self.at_ms += [self.clock.now_ms()] * bytes(data).count(b"\n")
        return super().write(data)


def test_a_pipe_without_a_start_time_gets_each_rating_when_it_is_due() -> None:
    clock = FakeClock()
    stream = Timed(clock)
    settings = load_settings(users=300, movies=100, sink="stdout", rate=20, duration_s=3)
    assert write_ratings(settings, stream, clock=clock).delivered == 60
    due = [json.loads(line)["timestamp"] for line in stream.getvalue().splitlines()]
    assert all(0 <= at - ms <= 20 for at, ms in zip(stream.at_ms, due, strict=True))
    assert due[-1] - due[0] > 2500


def test_a_pipe_with_a_start_time_is_written_at_once() -> None:
    clock = FakeClock()
    before = clock.now_ms()
    written(load_settings(**{**SMALL, "rate": 0.1}, sink="stdout", ratings=500), clock)
    assert clock.now_ms() == before


class Gone(io.BytesIO):
    """A pipe whose reader closes it after some lines."""

    def write(self, data: Any) -> int:
        if self.tell() > 100_000:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(data)


def test_a_reader_that_goes_away_ends_a_stream_without_end_and_fails_a_bounded_one() -> None:
    assert write_ratings(load_settings(**SMALL, sink="stdout"), Gone()).requested is None
    with pytest.raises(DeliveryError, match=r"the reader of the pipe went away after .* of 400,000 ratings"):
        write_ratings(load_settings(**SMALL, sink="stdout", ratings=400_000), Gone())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    path = tmp_path / "ratings.ndjson"
    with pytest.raises(DeliveryError, match=r"could not be written: No space left on device\. Free space"):
        write_ratings(load_settings(**SMALL, sink="ndjson", output=path, ratings=10))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_stopped_leaves_no_file(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    for kind in ("ndjson", "parquet"):
        settings = load_settings(**SMALL, sink=kind, output=tmp_path / "out", ratings=10)
        with pytest.raises(DeliveryError, match="stopped after 0 of 10 ratings"):
            write_ratings(settings, stop=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_and_a_folder_that_is_not_are_refused(tmp_path: Path) -> None:
    there = tmp_path / "mine.txt"
    there.write_text("mine")
    for path, named in ((there, "exists already"), (tmp_path / "no" / "x", "No such file"), (tmp_path, "exists")):
        with pytest.raises(ConfigurationError, match=named):
            write_ratings(load_settings(**SMALL, sink="ndjson", output=path, ratings=10))
    assert there.read_text() == "mine"


@pytest.mark.parametrize("changes", [{"users": 2}, {"users": 3, "partitions": 16}], ids=str)
def test_too_few_users_for_the_partitions_are_named_with_a_fix(changes: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no user falls to partition \d+: users=\d are too few\. Raise users"):
        write_ratings(load_settings(**{**SMALL, **changes}, sink="stdout", ratings=3), io.BytesIO())
    with pytest.raises(ConfigurationError, match="no user falls to partition"):
        write_ratings(load_settings(**{**SMALL, **changes}, sink="ndjson", output=tmp_path / "out", ratings=3))
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_delivers_to_kafka_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="sink=ndjson: a pipeline delivers to Kafka"):
        Pipeline(sink="ndjson", output=tmp_path / "x", ratings=1)
