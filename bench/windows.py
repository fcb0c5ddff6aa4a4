"""All views from Kafka: our job on RayDP, our job on plain local[2], and plain local[2] that counts and averages only; same topic."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import child, embedded_broker, goal, median
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.windows.stage import WindowStage

RATINGS = 3_000_000
ROUNDS = 3
KINDS = ("ours on RayDP", "ours on local[2]", "count and mean on local[2]")


def run() -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with embedded_broker() as bootstrap:
        ensure_topics(load_settings(), bootstrap)
        child([sys.executable, "-m", "bench.windows", bootstrap, "fill"])
        for _ in range(ROUNDS):
            for kind in KINDS:
                out, _, _ = child([sys.executable, "-m", "bench.windows", bootstrap, kind])
                row = json.loads(out.strip().splitlines()[-1])
                assert row["counted"] == RATINGS, row
                rows[kind].append(row)
    result: dict[str, Any] = {
        kind: {"ratings_per_s": round(median(found, "rate")), "rounds": found} for kind, found in rows.items()
    }
    ours, plain, least = (result[kind]["ratings_per_s"] for kind in KINDS)
    result["goals"] = [
        goal(f"{KINDS[0]} / {KINDS[2]}", round(ours / least, 2), least=0.6),
        goal(f"{KINDS[0]} / {KINDS[1]}", round(ours / plain, 2), least=0.95),
    ]
    return result


def _fill(bootstrap: str) -> None:
    """Ratings at 5,000 a second of event time, sent as fast as they can be: ten minutes of windows."""
    from ray_pipeline.codec import encode_keys, encode_values
    from ray_pipeline.delivery.interface import Epoch
    from ray_pipeline.generator.plan import RatePlan
    from ray_pipeline.generator.shard import Shard
    from ray_pipeline.kafka.client import make_producer
    from ray_pipeline.model.catalogue import load_catalogue
    from ray_pipeline.model.population import build_movies, build_user_map
    from ray_pipeline.model.ratings import ShardModel

    settings = load_settings()
    movies, user_map = build_movies(settings, load_catalogue(settings)), build_user_map(settings)
    producer = make_producer(bootstrap)
    plan = RatePlan([Epoch(1_700_000_040_000, 5000.0)])
    shards = [
        Shard(
            ShardModel.of_shard(settings, p, user_map, movies),
            0.25,
            0.5,
            plan,
            RATINGS // 4,
        )
        for p in range(4)
    ]
    while not all(shard.done for shard in shards):
        for shard in shards:
            batch = shard.take(min(10_000, (shard.end_index or 0) - shard.next_index))
            for key, value in zip(encode_keys(batch), encode_values(batch), strict=True):
                while True:
                    try:
                        producer.produce(settings.ratings_topic, value, key, shard.partition)
                        break
                    except BufferError:
                        producer.poll(0.05)
    assert producer.flush(60) == 0


def _ours(settings: Settings, bootstrap: str, master: str | None) -> dict[str, Any]:
    if master is None:
        from ray_pipeline.cluster.runtime import RayRuntime

        RayRuntime(settings, ("process",)).start()
    stage = WindowStage(settings, bootstrap, master=master)
    stage.start_session()
    _warm(stage.spark)
    began = time.monotonic()
    stage.start_query()
    assert stage.drain(600)
    seconds = time.monotonic() - began
    status = stage.status()
    stage.stop()
    return {"rate": RATINGS / seconds, "counted": status["counted"], "late_dropped": status["late_dropped"]}


def _count_and_mean(settings: Settings, bootstrap: str) -> dict[str, Any]:
    from pyspark.sql import functions as F

    stage = WindowStage(settings, bootstrap, master="local[2]")
    spark = stage.start_session()
    _warm(spark)
    counts: dict[Any, int] = {}

    def take(frame: Any, _batch: int) -> None:
        for row in frame.collect():
            counts[row.window.start] = row["count"]

    raw = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", bootstrap)
        .option("subscribe", settings.ratings_topic)
        .option("startingOffsets", "earliest")
        .option("maxOffsetsPerTrigger", str(settings.max_offsets_per_trigger))
        .load()
    )
    rating = F.from_json(
        F.col("value").cast("string"), "userId LONG, movieId LONG, rating DOUBLE, timestamp LONG"
    ).alias("r")
    timed = (
        raw.select(rating)
        .select("r.rating", F.timestamp_millis("r.timestamp").alias("at"))
        .withWatermark("at", "1 minute")
    )
    windows = timed.groupBy(F.window("at", "1 minute")).agg(F.count("*").alias("count"), F.avg("rating"))
    began = time.monotonic()
    writer = windows.writeStream.outputMode("update").foreachBatch(take)
    query = writer.option("checkpointLocation", settings.checkpoint_uri).start()
    query.processAllAvailable()
    query.processAllAvailable()
    seconds = time.monotonic() - began
    query.stop()
    stage.stop()
    return {"rate": RATINGS / seconds, "counted": sum(counts.values())}


def _warm(spark: Any) -> None:
    """A first job, so that all kinds are measured on executors that are up."""
    spark.range(1_000_000, numPartitions=4).selectExpr("sum(id)").collect()


def _one(bootstrap: str, kind: str) -> None:
    if kind == "fill":
        _fill(bootstrap)
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(state_dir=Path(folder), metrics_topic="bench.metrics", job_topic="bench.job")
        ensure_topics(settings, bootstrap)
        if kind == KINDS[2]:
            row = _count_and_mean(settings, bootstrap)
        else:
            row = _ours(settings, bootstrap, None if kind == KINDS[0] else "local[2]")
    print(json.dumps(row))


if __name__ == "__main__":
    _one(*sys.argv[1:])
