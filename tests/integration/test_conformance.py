"""Conformance of what really lies in Kafka."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.config import Settings, load_settings
from ray_pipeline.conformance.world import World
from ray_pipeline.delivery.factory import open_delivery
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.truth.replay import ShardReplay, build_models
from tests.conftest import command

pytestmark = pytest.mark.timeout(180)

T0 = 1_700_000_040_000
EACH = 8_000


def deliver(broker: str, said: Settings, real: Settings) -> None:
    """Deliver the ratings of one configuration as those of another."""
    ensure_topics(said, broker)
    world = World(said)
    config = said.digest(world.catalogue.digest)
    models = build_models(real, world.catalogue, range(said.partitions))
    for partition, schedule in world.schedules.items():
        last_ms = int(schedule.due_ms(EACH - 1, 1)[0])
        lived = (schedule.plan.epochs, schedule.share, schedule.phase)
        progress = ShardProgress("run", config, partition, EACH, last_ms, T0, *lived)
        delivery = open_delivery(said, broker, partition)
        delivery.open(30)
        delivery.send(ShardReplay(models[partition], progress).events(0, EACH))
        delivery.commit(progress)
        delivery.close()
    run = {"run": "run", "config": config, "catalogue": world.catalogue.digest, "start_ms": T0}
    producer = make_producer(broker)
    value = json.dumps({**run, "settings": said.event_settings()}).encode()
    producer.produce(said.progress_topic, key=b"run", value=value)
    assert producer.flush(20) == 0


def judged(broker: str, settings: Settings, state_dir: Path, *more: str | Path) -> tuple[int, dict[str, Any]]:
    flags = ("--bootstrap-servers", broker, "--progress-topic", settings.progress_topic, "--state-dir", state_dir)
    done = command("conformance", "--topic", settings.ratings_topic, "--json", *flags, *more)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


def test_what_lies_in_the_topic_is_judged_against_what_the_run_published(broker: str, tmp_path: Path) -> None:
    def settings(name: str, **changes: Any) -> Settings:
        topics = {f"{topic}_topic": f"conformance-{name}.{topic}" for topic in ("ratings", "progress", "control")}
        return load_settings(
            state_dir=tmp_path, start_time_ms=T0, users=3_000, movies=300, partitions=2, **topics, **changes
        )

    right, wrong = settings("right"), settings("wrong")
    deliver(broker, right, right)
    deliver(broker, wrong, settings("wrong", factor_share=0.45))
    code, found = judged(broker, right, tmp_path, "--report", tmp_path / "report.html")
    assert (code, found["verdict"], found["events"], found["unreadable"]) == (0, "conforms", 2 * EACH, 0)
    assert {row["name"] for row in found["checks"] if row["verdict"] == "unchecked"} == {"amount"}
    assert "<svg" in (tmp_path / "report.html").read_text()
    producer = make_producer(broker)
    producer.produce(right.ratings_topic, key=b"1", value=b"rubbish", partition=0)
    assert producer.flush(20) == 0
    code, found = judged(broker, right, tmp_path)
    assert (code, found["events"], found["unreadable"]) == (1, 2 * EACH, 1)
    assert [row["name"] for row in found["checks"] if row["verdict"] == "deviates"] == ["malformed"]
    code, found = judged(broker, wrong, tmp_path)
    assert (code, found["verdict"]) == (1, "deviates")
    deviate = {row["name"]: row["estimate"] for row in found["checks"] if row["verdict"] == "deviates"}
    assert set(deviate) >= {"factors", "noise"} and "mean" not in deviate
    assert deviate["factors"] == pytest.approx(0.45, abs=0.03)
