"""Delivered rate over 10 s, or 20 ratings, beside the target or the plan: the generator alone, exactly-once, two actors."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.common import BIN, embedded_broker, goal
from ray_pipeline.config import load_settings
from ray_pipeline.delivery.interface import Epoch
from ray_pipeline.generator.plan import RatePlan
from ray_pipeline.kafka.read import count_records, read_compacted

PLAN = "ramp(0..5000, 20s) then sine(mean=5000, amplitude=4000, period=30s) + burst(20000 for 2s every 15s)"
PLAN_SPANS = 6
RATES = (0.1, 1.0, 10.0, 1_000.0, 10_000.0, 50_000.0, 100_000.0)
SETTLE_S, SPAN_S = 5.0, 10.0
SPAN_RATINGS = 20
MOST_OFF_PERCENT = 1.0


def run() -> dict[str, Any]:
    rows, spans = [], []
    with embedded_broker() as bootstrap, tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            span_s = max(SPAN_S, SPAN_RATINGS / rate)
            seconds = SETTLE_S + span_s + 5 + 10 / rate  # the smallest shard has one of ten
            with _generating(bootstrap, folder, f"pacing-{rate:g}", seconds, "--rate", str(rate)) as topic:
                sent = _sample(bootstrap, topic, span_s)
            rows.append({"target": rate, "delivered": round(sent, 2), "off_percent": round(100 * (sent / rate - 1), 2)})
            print(rows[-1], flush=True)
        seconds = SETTLE_S + SPAN_S * PLAN_SPANS + 5
        with _generating(bootstrap, folder, "pacing-plan", seconds, "--plan", PLAN) as topic:
            for expected, sent in _against_plan(bootstrap, topic):
                off_percent = round(100 * (sent / expected - 1), 2)
                spans.append({"plan": round(expected, 1), "delivered": round(sent, 1), "off_percent": off_percent})
                print(spans[-1], flush=True)
    goals = [goal(f"off {row['target']:,g}/s, %", abs(row["off_percent"]), most=MOST_OFF_PERCENT) for row in rows]
    return {"span_s": SPAN_S, "goals": goals, "rows": rows, "plan": PLAN, "spans": spans}


@contextmanager
def _generating(bootstrap: str, folder: str, topic: str, seconds: float, *load: str) -> Iterator[str]:
    """A generator while it sends; the name of its progress topic."""
    summary = Path(folder) / f"{topic}.json"
    process = subprocess.Popen(
        [
            *(BIN / "ray-pipeline", "generate", "--bootstrap-servers", bootstrap, *load, "--duration", str(seconds)),
            *("--ratings-topic", topic, "--progress-topic", f"{topic}.p"),
            *("--state-dir", folder, "--summary-json", summary),
        ],
        stdout=subprocess.DEVNULL,
    )
    yield f"{topic}.p"
    process.wait(120)
    assert json.loads(summary.read_text())["delivered"] == count_records(bootstrap, topic).total


def _progress(bootstrap: str, topic: str) -> list[dict[str, Any]]:
    try:
        records = read_compacted(bootstrap, topic)
    except Exception:  # noqa: BLE001 - the topic is still to be made
        return []
    return [record for key, record in records.items() if key.startswith("shard/")]


def _sent(shards: list[dict[str, Any]]) -> tuple[float, int]:
    """When the newest was committed, seconds, and how many ratings all have sent."""
    return max((r["committed_ms"] for r in shards), default=0) / 1000, sum(r["next_index"] for r in shards)


def _sample(bootstrap: str, topic: str, span_s: float) -> float:
    """Ratings a second over the next span, from the shards' own progress records, each from one of its commits to another."""
    partitions = load_settings().partitions
    while sum(shard["next_index"] > 0 for shard in _progress(bootstrap, topic)) < partitions:
        time.sleep(0.2)
    time.sleep(SETTLE_S)
    first = {shard["partition"]: shard for shard in _progress(bootstrap, topic)}
    time.sleep(span_s)
    rate = 0.0
    for last in _progress(bootstrap, topic):
        before = first[last["partition"]]
        sent, took_ms = last["next_index"] - before["next_index"], last["committed_ms"] - before["committed_ms"]
        rate += 1000 * sent / took_ms
    return rate


def _against_plan(bootstrap: str, topic: str) -> Iterator[tuple[float, float]]:
    """What the plan says and what was sent, ratings a second, over each of the next spans."""
    while not (shards := _progress(bootstrap, topic)) or not _sent(shards)[1]:
        time.sleep(0.2)
    plan = RatePlan(Epoch.from_record(epoch) for epoch in shards[0]["epochs"])
    time.sleep(SETTLE_S)
    for _ in range(PLAN_SPANS):
        begin, before = _sent(_progress(bootstrap, topic))
        time.sleep(SPAN_S)
        end, after = _sent(_progress(bootstrap, topic))
        yield (
            (plan.expected(end * 1000) - plan.expected(begin * 1000)) / (end - begin),
            (after - before) / (end - begin),
        )
