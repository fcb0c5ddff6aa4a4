"""Full ratings delivered a second, and CPU µs each, beside Kafka's own ProducerPerformance on the same broker.

Both: acks=all, idempotent, lz4, linger 5 ms, four partitions. Ours draws, encodes, keys and counts; theirs
sends one payload of 80 bytes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from typing import Any

from bench.common import child, embedded_broker, median
from ray_pipeline.config import load_settings
from ray_pipeline.delivery.factory import open_delivery
from ray_pipeline.generator.coordination import Coordinator
from ray_pipeline.generator.runner import Assignment
from ray_pipeline.generator.worker import GeneratorWorker, Orders
from ray_pipeline.kafka.read import count_records
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_movies, build_user_map
from spark_compat.jars import kafka_tools_jars
from spark_compat.jvm import find_java

RATINGS = 2_000_000
ROUNDS = 3


def run() -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {"exactly-once": [], "at-least-once": [], "ProducerPerformance": []}
    with embedded_broker() as bootstrap:
        for number in range(ROUNDS):
            for kind in ("exactly-once", "at-least-once"):
                topic = f"{kind}-{number}"
                out, _, _ = child([sys.executable, "-m", "bench.producer", bootstrap, topic, kind])
                row = json.loads(out)
                row["counted"] = count_records(bootstrap, topic).total
                assert row["counted"] == RATINGS, row
                rows[kind].append(row)
            rows["ProducerPerformance"].append(_theirs(bootstrap, f"perf-{number}"))
    result: dict[str, Any] = {
        kind: {
            "ratings_per_s": round(median(found, "rate")),
            "cpu_us_each": round(median(found, "cpu_us"), 2),
            "rounds": found,
        }
        for kind, found in rows.items()
    }
    theirs = result["ProducerPerformance"]["ratings_per_s"]
    result["ratio_to_ProducerPerformance"] = {
        kind: round(result[kind]["ratings_per_s"] / theirs, 2) for kind in ("exactly-once", "at-least-once")
    }
    return result


def _theirs(bootstrap: str, topic: str) -> dict[str, Any]:
    ensure_topics(load_settings(ratings_topic=topic), bootstrap)
    jars = os.pathsep.join(map(str, kafka_tools_jars()))
    properties = f"bootstrap.servers={bootstrap} acks=all compression.type=lz4 linger.ms=5 batch.size=131072"
    command = [str(find_java().executable), "-Xmx512m", "-cp", jars, "org.apache.kafka.tools.ProducerPerformance"]
    command += ["--topic", topic, "--num-records", str(RATINGS), "--record-size", "80", "--throughput", "-1"]
    out, _, cpu = child([*command, "--producer-props", *properties.split()])
    last = out.strip().splitlines()[-1]
    sent, rate = re.search(r"(\d+) records sent, ([\d.]+) records/sec", last).groups()  # type: ignore[union-attr]
    assert int(sent) == count_records(bootstrap, topic).total == RATINGS
    return {"rate": float(rate), "cpu_us": cpu / RATINGS * 1e6, "counted": int(sent)}


def _ours(bootstrap: str, topic: str, kind: str) -> None:
    """In a process of its own: sends as fast as it can, and prints what it took."""
    settings = load_settings(
        rate=1e8,
        ratings=RATINGS,
        ratings_topic=topic,
        progress_topic=f"{topic}.progress",
        delivery=kind,
        commit_interval_ms=200,
    )
    ensure_topics(settings, bootstrap)
    catalogue, user_map = load_catalogue(settings), build_user_map(settings)
    coordinator = Coordinator(settings, settings.digest(catalogue.digest), [user_map.share(p) for p in range(4)])
    movies = build_movies(settings, catalogue)
    worker = GeneratorWorker(settings, movies, lambda p: open_delivery(settings, bootstrap, p))
    began = cpu = 0.0
    told: dict[int, Assignment] = {}
    while True:
        coordinator.observe(list(worker.exchange(Orders({p: told.get(p) for p in range(4)})).shards))
        told = coordinator.assignments(time.time_ns() // 1_000_000)
        if told:
            began, cpu = began or time.monotonic(), cpu or time.process_time()
        totals = coordinator.totals()
        assert totals.failed is None, totals
        if totals.finished:
            break
        threading.Event().wait(0.01)
    wall, cpu = time.monotonic() - began, time.process_time() - cpu
    print(json.dumps({"rate": RATINGS / wall, "cpu_us": cpu / RATINGS * 1e6, "delivered": totals.delivered}))


if __name__ == "__main__":
    _ours(*sys.argv[1:])
