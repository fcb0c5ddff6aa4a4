"""A plan with random arrivals on real parts: the past at once, then live, record for record what it must be."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.config import load_settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.kafka.read import read_compacted, read_topic
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.truth.replay import ShardReplay, build_models
from tests.conftest import Running, command, wait_for

pytestmark = pytest.mark.timeout(200)

TOPICS = {f"{kind}_topic": f"plan.{kind}" for kind in ("ratings", "progress", "control")}
PAST_MS = 1_800_000
PLAN = "sine(mean=4, amplitude=4, period=10m) + burst(40 for 10s every 5m)"
LIVE = "20 + burst(200 for 1s every 3s)"


def test_the_past_is_sent_at_once_and_the_stream_goes_on_live_without_gap_or_overlap(
    broker: str, starter: Callable[..., Running]
) -> None:
    begin_ms = time.time_ns() // 1_000_000 - PAST_MS
    topics = [word for name, topic in TOPICS.items() for word in ("--" + name.replace("_", "-"), topic)]
    running = starter(
        *("generate", "--bootstrap-servers", broker, "--users", "3000", "--movies", "500", "--arrivals", "poisson"),
        *("--start-time", str(begin_ms), "--speed", "max", "--plan", PLAN, *topics),
    )

    def generator(state: str) -> Any:
        said = read_compacted(broker, TOPICS["progress_topic"]).get("generator", {})
        return said if said.get("state") == state else None

    running.info()
    live = wait_for("the present", lambda: generator("running"), 60)
    assert live["event_reached_ms"] == pytest.approx(time.time_ns() // 1_000_000, abs=5_000)
    assert any("it is live" in event["what"] for event in live["events"])
    state = ("--state-dir", running.state_dir, "--bootstrap-servers", broker, *topics[2:])
    done = command("plan", LIVE, *state)
    assert done.returncode == 0 and f"plan {LIVE}" in done.stdout, done.stderr
    refused = command("plan", "20 then 3", *state)
    assert refused.returncode == 2 and "character 4" in refused.stderr
    before = sum(count for count in sent(broker).values())
    wait_for("more", lambda: sum(sent(broker).values()) > before + 150, 20)
    assert running.end() == 0, running.text
    compare(broker, begin_ms)


def sent(broker: str) -> dict[str, int]:
    records = read_compacted(broker, TOPICS["progress_topic"])
    return {key: record["next_index"] for key, record in records.items() if key.startswith("shard/")}


def compare(broker: str, begin_ms: int) -> None:
    """Regenerated from the progress records alone."""
    settings = load_settings(users=3000, movies=500, arrivals="poisson")
    models = build_models(settings, load_catalogue(settings), range(4))
    there: dict[int, list[tuple[bytes, bytes | None]]] = defaultdict(list)
    for record in read_topic(broker, TOPICS["ratings_topic"]):
        there[record.partition].append((str(record.key).encode(), record.value))
    times = []
    for key, record in read_compacted(broker, TOPICS["progress_topic"]).items():
        if key.startswith("shard/"):
            progress = ShardProgress.from_record(record)
            events = ShardReplay(models[progress.partition], progress).events(0, progress.next_index)
            expected = list(zip(encode_keys(events), encode_values(events), strict=True))
            assert there[progress.partition] == expected
            assert [epoch.plan for epoch in progress.epochs] == [PLAN, LIVE]
            times.append(events.timestamps_ms - begin_ms)
    minutes = np.bincount(np.concatenate(times) // 60_000)[: PAST_MS // 60_000]
    phase = 2 * np.pi * (np.arange(len(minutes)) + 0.5) / 10
    due = 60 * (4 + 4 * np.sin(phase)) + np.where(np.arange(len(minutes)) % 5 == 0, 400, 0)
    assert (np.abs(minutes - due) <= 5 * np.sqrt(due) + 12).all()
