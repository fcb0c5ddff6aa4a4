"""The Spark job against the reference, on real Kafka and Spark, with a checkpoint on local disk and on real HDFS."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_pipeline.config import Settings, load_settings
from ray_pipeline.errors import StateMismatchError
from ray_pipeline.kafka.client import make_admin, make_producer
from ray_pipeline.kafka.read import read_compacted, read_topic
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.windows.reference import Ratings, Reference, reference
from ray_pipeline.windows.spec import iso_ms, window_specs
from ray_pipeline.windows.stage import WindowStage
from spark_compat.jars import minidfs_jars
from tests.conftest import wait_for

pytestmark = pytest.mark.timeout(300)

T0 = 1_700_000_040_000  # a full minute


@pytest.fixture(scope="session")
def hdfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A one-node HDFS in a JVM of its own; its URI."""
    from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway

    folder = tmp_path_factory.mktemp("hdfs")
    port, process = launch_gateway(
        classpath=":".join(map(str, minidfs_jars())), die_on_exit=True, cwd=str(folder), return_proc=True
    )
    gateway = JavaGateway(gateway_parameters=GatewayParameters(port=port, auto_convert=True))
    conf = gateway.jvm.org.apache.hadoop.conf.Configuration()
    conf.set("hdfs.minidfs.basedir", str(folder))
    cluster = gateway.jvm.org.apache.hadoop.hdfs.MiniDFSCluster.Builder(conf).numDataNodes(1).build()
    yield f"hdfs://127.0.0.1:{cluster.getNameNodePort()}"
    cluster.shutdown()
    gateway.shutdown()
    process.kill()
    process.wait()
    process.stdin.close()


@pytest.fixture(params=["local disk", "HDFS"])
def settings(request: pytest.FixtureRequest, broker: str, tmp_path: Path) -> Settings:
    name = request.param.replace(" ", "-")
    checkpoint, archive = None, (tmp_path / "archive").as_uri()
    if request.param == "HDFS":
        mine = f"{request.getfixturevalue('hdfs')}/user/me/{abs(hash(request.node.nodeid))}"
        checkpoint, archive = f"{mine}/checkpoint", f"{mine}/archive"
    prefix = f"job-{name}-{abs(hash(request.node.nodeid)) % 10**8}"
    found = load_settings(
        state_dir=tmp_path,
        checkpoint=checkpoint,
        archive=archive,
        partitions=3,
        top_n=20,
        watermark_s=60,
        **{
            f"{topic}_topic": f"{prefix}.{topic}"
            for topic in ("ratings", "metrics", "rejected", "progress", "control", "job")
        },
    )
    ensure_topics(found, broker)
    return found


class Job:
    """The job on plain Spark; goes on from its checkpoint when it is started again."""

    def __init__(self, settings: Settings, broker: str) -> None:
        self.settings = settings
        self.broker = broker
        self.stage = WindowStage(settings, broker, master="local[2]")
        self.stage.start()

    def drain(self) -> None:
        assert self.stage.drain(90)

    def told(self) -> dict[str, Any] | None:
        """Its newest record in Kafka, where it has written one since it was started."""
        found = read_compacted(self.broker, self.settings.job_topic).get("job", {})
        return found if found.get("application") == self.stage.status()["application"] else None

    def records(self) -> dict[str, dict[str, Any]]:
        return read_compacted(self.broker, self.settings.metrics_topic)


@pytest.fixture
def start(settings: Settings, broker: str) -> Iterator[Callable[[], Job]]:
    started: list[Job] = []

    def make() -> Job:
        started.append(Job(settings, broker))
        return started[-1]

    yield make
    for job in started:
        job.stage.stop()


def send(settings: Settings, broker: str, rows: list[tuple[int, int, float, int]]) -> None:
    """(user, movie, stars, event time) to Kafka, in one transaction: a micro-batch sees all of it or nothing."""
    producer = make_producer(broker, transactional_id=f"{settings.ratings_topic}-test")
    producer.init_transactions(30)
    producer.begin_transaction()
    for user, movie, stars, at in rows:
        value = json.dumps({"userId": user, "movieId": movie, "rating": stars, "timestamp": at})
        producer.produce(settings.ratings_topic, key=str(user), value=value, partition=user % 3)
    producer.commit_transaction(30)


def some(seed: int, count: int, from_ms: int, to_ms: int) -> list[tuple[int, int, float, int]]:
    """Ratings in no order of time; some of movies that the catalogue does not have."""
    rng = np.random.default_rng(seed)
    movies = np.where(rng.random(count) < 0.02, 5_000_000 + rng.integers(0, 5, count), rng.zipf(1.5, count) % 500 + 1)
    return [
        (int(user), int(movie), half / 2, int(at))
        for user, movie, half, at in zip(
            rng.integers(1, 1000, count),
            movies,
            rng.integers(1, 11, count),
            rng.integers(from_ms, to_ms, count),
            strict=True,
        )
    ]


def batches_as_spark_cut_them(settings: Settings, broker: str, spark: Any) -> list[Ratings]:
    """What each micro-batch read, from the offsets that Spark wrote down; so the reference knows what was late."""
    from spark_compat.hadoop import exists, read_text

    by_place = {(r.partition, r.offset): json.loads(r.value or b"") for r in read_topic(broker, settings.ratings_topic)}
    cuts: list[dict[str, int]] = []
    while exists(spark, f"{settings.checkpoint_uri}/offsets/{len(cuts)}"):
        text = read_text(spark, f"{settings.checkpoint_uri}/offsets/{len(cuts)}") or ""
        cuts.append(json.loads(text.splitlines()[2])[settings.ratings_topic])
    found = []
    before: dict[str, int] = {}
    for cut in cuts:
        rows = [
            by_place[int(p), offset]
            for p, end in cut.items()
            for offset in range(before.get(p, 0), end)
            if (int(p), offset) in by_place
        ]
        found.append(
            Ratings(
                np.array([r["movieId"] for r in rows], np.int64),
                np.array([r["rating"] for r in rows], np.float64),
                np.array([r["timestamp"] for r in rows], np.int64),
            )
        )
        before = cut
    return found


def agree(settings: Settings, records: dict[str, dict[str, Any]], batches: list[Ratings]) -> Reference:
    """Every record against the reference, and no record more; returns the tumbling windows."""
    catalogue = load_catalogue(settings)
    genres = {int(m): catalogue.genres[n] for n, m in enumerate(catalogue.movie_ids)}
    keys = set()
    results = []
    for spec in window_specs(settings):
        truth = reference(batches, spec.size_ms, spec.slide_ms, round(settings.watermark_s * 1000))
        results.append(truth)
        for start, window in truth.windows.items():
            prefix = f"{spec.name}|{iso_ms(start)}"
            keys |= {f"{prefix}|total", f"{prefix}|topn", f"{prefix}|genres"}
            total = records[f"{prefix}|total"]
            assert (total["window_start"], total["window_end"]) == (iso_ms(start), iso_ms(start + spec.size_ms))
            assert (total["count"], total["avg_rating"]) == (window.count, window.avg_rating)
            assert (total["p50"], total["p95"]) == (window.percentile(0.5), window.percentile(0.95))
            assert total["histogram"] == window.histogram()
            top = [(m["movieId"], m["count"], m["avg_rating"]) for m in records[f"{prefix}|topn"]["movies"]]
            assert top == window.top(settings.top_n)
            by_genre = [(g["genre"], g["count"], g["avg_rating"]) for g in records[f"{prefix}|genres"]["genres"]]
            assert by_genre == window.by_genre(genres)
    assert set(records) == keys
    return results[0]


def test_every_view_agrees_with_the_reference_late_rows_and_a_restart_included(
    settings: Settings, broker: str, start: Callable[[], Job]
) -> None:
    job = start()
    send(settings, broker, some(1, 3000, T0, T0 + 240_000))
    job.drain()
    send(settings, broker, some(2, 2000, T0 + 200_000, T0 + 420_000))
    job.drain()
    watermark_ms = job.stage.status()["watermark_ms"]
    job.stage.stop()
    job = start()  # from its checkpoint
    told = wait_for("its first heartbeat", job.told)
    assert (told["lag"], told["watermark_ms"]) == (
        0,
        watermark_ms,
    ) and watermark_ms > T0  # before there is anything to read
    send(settings, broker, some(3, 1500, T0, T0 + 500_000))  # some of it late
    job.drain()
    send(settings, broker, some(4, 500, T0, T0 + 100_000))  # all of it late for its tumbling windows
    job.drain()
    send(settings, broker, some(5, 500, T0 + 500_000, T0 + 600_000))
    job.drain()
    batches = batches_as_spark_cut_them(settings, broker, job.stage.spark)
    assert sum(len(b.movie_ids) for b in batches) == 7500
    tumbling = agree(settings, job.records(), batches)
    status = job.stage.status()
    assert tumbling.late > 500
    assert (status["valid"], status["late_dropped"], status["rejected"]) == (7500, tumbling.late, 0)
    assert status["counted"] == 7500 - tumbling.late
    wait_for("the pool that it runs in", lambda: job.stage.status()["pool"] == "streaming", 10)
    archive_agrees(settings, job.stage.spark, tumbling)


def archive_agrees(settings: Settings, spark: Any, tumbling: Reference) -> None:
    """Every rating once, late ones too; the windows as the reference has them."""
    ratings = spark.read.parquet(f"{settings.archive}/ratings")
    assert ratings.count() == ratings.select("partition", "offset").distinct().count() == 7500
    windows = spark.read.parquet(f"{settings.archive}/windows").where("window_type = 'tumbling_1min'")
    rows = windows.selectExpr("unix_millis(window_start) AS start_ms", "count", "final").collect()
    assert {r["start_ms"]: r["count"] for r in rows} == {start: w.count for start, w in tumbling.windows.items()}
    assert any(r["final"] for r in rows) and not all(r["final"] for r in rows)


def test_a_wiped_topic_is_a_clear_end_not_silence(settings: Settings, broker: str, start: Callable[[], Job]) -> None:
    job = start()
    send(settings, broker, some(1, 300, T0, T0 + 60_000))
    job.drain()
    job.stage.stop()
    admin = make_admin(broker)
    admin.delete_topics([settings.ratings_topic])[settings.ratings_topic].result(20)
    wait_for("the topic is gone", lambda: settings.ratings_topic not in admin.list_topics(timeout=5).topics)
    ensure_topics(settings, broker)
    send(settings, broker, some(2, 30, T0, T0 + 60_000))
    job = start()
    wait_for("the end", lambda: job.stage.status()["state"] == "failed", 60)
    assert "are gone" in job.stage.status()["reason"] and "reset" in job.stage.status()["reason"]


def test_a_checkpoint_of_other_windows_is_refused(settings: Settings, broker: str, start: Callable[[], Job]) -> None:
    start().stage.stop()
    other = settings.model_copy(update={"tumbling_s": 30})
    stage = WindowStage(other, broker, master="local[2]")
    try:
        with pytest.raises(StateMismatchError, match="tumbling_s was 60, is 30"):
            stage.start()
    finally:
        stage.stop()
