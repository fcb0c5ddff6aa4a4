"""Full ratings delivered a second, and CPU µs each: plain, fast and idempotent, beside Kafka's own and librdkafka's own benchmarks.

All on one broker in alternated rounds, medians over rounds: acks=all, idempotent, lz4, linger 20 ms, four partitions; what was sent is
counted by reading it back ``read_committed``. Ours draws, encodes and keys distinct ratings, without pacing: four shards on threads of
as many processes as the pipeline has actors by default, and of one process. Java's ``ProducerPerformance`` and C's
``rdkafka_performance`` send one payload of 80 bytes without a key from one process. CPU is that of all processes; ours without their
start.

C's is not in any package as a program. It takes part when ``RDKAFKA_PERFORMANCE`` names it; Debian's sources build it::

    apt-get source librdkafka         # needs a deb-src line in the sources of apt
    cd librdkafka-*/
    ./configure --disable-ssl --disable-gssapi --disable-curl --disable-zstd
    make libs && make -C examples rdkafka_performance
    RDKAFKA_PERFORMANCE=$PWD/examples/rdkafka_performance make -C …/ray-pipeline bench ARGS=delivery
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import numpy as np

from bench.common import Row, alternated, child, goal, medians, ratio
from ray_pipeline.codec import encode_columns
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.factory import fallback, open_delivery
from ray_pipeline.delivery.interface import Epoch, ShardDelivery, ShardProgress
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.arrivals import poisson_arrivals
from ray_pipeline.generator.placement import Placement
from ray_pipeline.generator.plan import RatePlan, ShardSchedule
from ray_pipeline.generator.runner import MOST_RATINGS_AT_ONCE as BATCH
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_movies, build_user_map
from ray_pipeline.model.ratings import ShardModel
from spark_compat.jars import kafka_tools_jars
from spark_compat.jvm import find_java

START_MS = 1_700_000_000_000
RATINGS = 3_000_000
ROUNDS = 5
INTERVALS_MS = (100, 200, 1000)
PLAIN, FAST, IDEMPOTENT, JAVA, C = "plain", "fast", "idempotent", "ProducerPerformance", "rdkafka_performance"
ALONE = ", one process"
_ready: Barrier
WAYS: dict[str, dict[str, Any]] = {PLAIN: {}, FAST: {"fast": True}, IDEMPOTENT: {"delivery": "at-least-once"}}


def run() -> dict[str, Any]:
    ways = _ways()
    rows = alternated(ways, ROUNDS)
    fast, plain = f"{FAST} 200 ms", f"{PLAIN} 200 ms"
    goals = [(plain, JAVA, 1.0), (fast, C, 0.75), (fast, plain, 1.7)]
    goals += [(a + ALONE, b + ALONE if b == plain else b, least) for a, b, least in goals]
    costs = [(f"{PLAIN} {ms} ms", f"{IDEMPOTENT} {ms} ms") for ms in INTERVALS_MS]
    return {
        "ratings": RATINGS,
        "rounds": ROUNDS,
        "actors": load_settings().actors,
        "goals": [goal(f"{a} / {b}", ratio(rows, a, b)["median"], least) for a, b, least in goals if b in rows],
        **{f"{a} / {b}": ratio(rows, a, b) for a, b, *_ in [*goals, *costs] if b in rows},
        "ways": medians(rows),
    }


def _ways() -> dict[str, Callable[[str, str], Row]]:
    ways: dict[str, Callable[[str, str], Row]] = {
        f"{kind} {interval} ms": partial(_ours, kind, interval, {})
        for interval in INTERVALS_MS
        for kind in (PLAIN, IDEMPOTENT)
    }
    ways[f"{FAST} 200 ms"] = partial(_ours, FAST, 200, {})
    for kind in (PLAIN, FAST):
        ways[f"{kind} 200 ms{ALONE}"] = partial(_ours, kind, 200, {"actors": 1})
    ways[JAVA] = _java
    if os.environ.get("RDKAFKA_PERFORMANCE"):
        ways[C] = partial(_c, os.environ["RDKAFKA_PERFORMANCE"])
    return ways


def _ours(kind: str, interval_ms: int, changes: dict[str, Any], bootstrap: str, topic: str) -> Row:
    arguments = [bootstrap, topic, kind, str(interval_ms), str(RATINGS), json.dumps(changes)]
    row: Row = json.loads(child([sys.executable, "-m", "bench.delivery", *arguments])[0])
    return row


def _java(bootstrap: str, topic: str) -> Row:
    jars = os.pathsep.join(map(str, kafka_tools_jars()))
    properties = f"bootstrap.servers={bootstrap} acks=all compression.type=lz4 linger.ms=20 batch.size=131072"
    command = [str(find_java().executable), "-Xmx512m", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
    command += ["-cp", jars, "org.apache.kafka.tools.ProducerPerformance"]
    command += ["--topic", topic, "--num-records", str(RATINGS), "--record-size", "80", "--throughput", "-1"]
    out, _, cpu = child([*command, "--producer-props", *properties.split()])
    return _reported(r"(\d+) records sent, ([\d.]+) records/sec", out, cpu)


def _c(program: str, bootstrap: str, topic: str) -> Row:
    properties = ["enable.idempotence=true", "linger.ms=20", "batch.num.messages=10000"]
    properties += ["queue.buffering.max.messages=100000", "queue.buffering.max.kbytes=65536"]
    command = [program, "-P", "-t", topic, "-b", bootstrap, "-s", "80", "-c", str(RATINGS), "-z", "lz4", "-a", "-1"]
    out, _, cpu = child([*command, *(part for p in properties for part in ("-X", p))])
    return _reported(r"(\d+) messages produced .* (\d+) msgs/s", out, cpu)


def _reported(pattern: str, out: str, cpu: float) -> Row:
    """What the program says of itself at its end."""
    sent, rate = re.findall(pattern, out)[-1]
    assert int(sent) == RATINGS, out
    return {"rate": float(rate), "cpu_us": cpu / RATINGS * 1e6, "sent": RATINGS}


def _send(bootstrap: str, topic: str, kind: str, interval_ms: str, ratings: str, changes: str = "{}") -> None:
    """Sends as fast as it can, a process an actor, a thread a shard, and prints what it took."""
    told: dict[str, Any] = {**WAYS[kind], **json.loads(changes)}
    settings = load_settings(
        ratings_topic=topic,
        progress_topic=f"{topic}.progress",
        commit_interval_ms=interval_ms,
        **({} if "plan" in told else {"rate": 1e6}),
        **told,
    )
    assert fallback(settings) is None
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(settings.actors)
    with ProcessPoolExecutor(settings.actors, context, _get_ready, (ready,)) as pool:
        of_actor = partial(_send_as, settings, bootstrap, int(ratings))
        began, ended, cpu, sent = zip(*pool.map(of_actor, range(settings.actors)), strict=True)
    count = sum(sent)
    print(json.dumps({"rate": count / (max(ended) - min(began)), "cpu_us": sum(cpu) / count * 1e6, "sent": count}))


def _get_ready(ready: Barrier) -> None:
    """In a process of its own: where it waits for the others before it sends."""
    global _ready
    _ready = ready


def _send_as(settings: Settings, bootstrap: str, ratings: int, actor: int) -> tuple[float, float, float, int]:
    """All shards of one actor, once every actor is ready: began and ended (monotonic seconds), CPU seconds, ratings sent."""
    movies, user_map = build_movies(settings, load_catalogue(settings)), build_user_map(settings)
    sends = []
    for p in Placement(settings.partitions, settings.actors).of(actor):
        model = ShardModel.of_shard(settings, p, user_map, movies)
        delivery = open_delivery(settings, bootstrap, p)
        delivery.open(60)
        share = user_map.share(p)
        sends.append(partial(_send_shard, settings, model, delivery, share, round(ratings * share)))
    # for its first array Arrow loads pandas, which is part of the start
    encode_columns(EventBatch(0, 0, *np.ones((4, 1), np.int64)))
    _ready.wait(60)
    with ThreadPoolExecutor(len(sends)) as pool:
        began, cpu = time.monotonic(), time.process_time()
        count = sum(send.result() for send in [pool.submit(send) for send in sends])
        return began, time.monotonic(), time.process_time() - cpu, count


def _send_shard(settings: Settings, model: ShardModel, delivery: ShardDelivery, share: float, count: int) -> int:
    """Every rating of the shard, in batches as large as the generator's, a commit an interval; how many there were."""
    epochs = (Epoch(START_MS, 0.0, settings.plan, START_MS) if settings.plan else Epoch(START_MS, settings.rate),)
    poisson_seed = settings.seed if settings.arrivals == "poisson" else None
    arrivals = poisson_arrivals(poisson_seed, model.partition)
    sequence = ShardSequence(model, ShardSchedule(RatePlan(epochs), share, 0.5, arrivals), 0)
    at, committed_ms = 0, time.monotonic() * 1000
    while at < count:
        batch = sequence.events(at, min(BATCH, count - at))
        delivery.send(batch)
        at = batch.next_index
        now_ms = time.monotonic() * 1000
        if at == count or now_ms - committed_ms >= settings.commit_interval_ms:
            due_ms = sequence.due_ms(at - 1)
            progress = ShardProgress("bench", "bench", model.partition, at, due_ms, START_MS, epochs, share, 0.5)
            delivery.commit(progress)
            committed_ms = now_ms
    delivery.close()
    return count


if __name__ == "__main__":
    _send(*sys.argv[1:])
