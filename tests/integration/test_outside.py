"""Ratings from outside on real parts: beside the shards' own in Kafka, in the windows, verified, and known apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ray_pipeline.clock import FakeClock, SystemClock
from ray_pipeline.delivery.outside import OutsideDelivery
from ray_pipeline.kafka.read import read_compacted, read_topic
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.serving.api import make_api
from ray_pipeline.serving.feed import Feed
from ray_pipeline.serving.gate import ControlGate
from ray_pipeline.serving.outside import OutsideQueue
from ray_pipeline.truth.audit import KINDS
from ray_pipeline.verification.audit import audit
from ray_pipeline.verification.explain import Explainer
from ray_pipeline.verification.oracle import OracleStage
from ray_pipeline.windows.spec import window_specs
from ray_pipeline.windows.stage import WindowStage
from tests.conftest import wait_for
from tests.integration.test_truth import (
    T0,
    deliver,
    later_ms,
    make_world,
    publish_run,
    verdicts_of,
    world_settings,
)

pytestmark = pytest.mark.timeout(300)


def posted(settings: Any, broker: str, now_ms: int, ratings: list[dict[str, Any]]) -> None:
    """Post ratings over HTTP when the event clock shows a time, and wait until they are in Kafka."""
    queue = OutsideQueue(lambda: OutsideDelivery(broker, settings.ratings_topic, settings.outside_topic))
    store, clock = MetricsStore(tuple(s.name for s in window_specs(settings))), FakeClock(now_ms)
    unused: Any = None
    app = make_api(
        *(
            store,
            load_catalogue(settings),
            unused,
            unused,
            ControlGate("token-of-nobody", (8000,)),
            unused,
            10,
            clock,
            unused,
        ),
        outside=queue,
    )
    client = TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5))
    assert client.post("/ratings", json=ratings).status_code == 202
    queue.close(30)
    assert (queue.delivered, queue.lost) == (len(ratings), 0)


def expected_in(settings: Any, broker: str, what: str) -> int:
    """How many ratings the tumbling windows must hold."""
    records = read_compacted(broker, settings.expected_topic).items()
    return sum(window[what] for key, window in records if key.startswith("tumbling"))


def test_posted_ratings_are_in_the_windows_verified_and_counted_apart(broker: str, tmp_path: Path) -> None:
    settings = world_settings(tmp_path)
    ensure_topics(settings, broker)
    world = make_world(settings, broker)
    publish_run(settings, broker)
    job, oracle = WindowStage(settings, broker, master="local[2]"), OracleStage(settings, broker)
    job.start()
    rating = {"userId": 10**7, "movieId": 17, "rating": 4.5}
    oracle.start()
    try:
        for number in range(3):
            deliver(world, number)
            at_ms = T0 + (number + 1) * 60_000
            posted(settings, broker, at_ms, [{**rating, "userId": 10**7 + n} for n in range(5)])
            # too late for its windows, but for the first times
            posted(settings, broker, at_ms, [{**rating, "timestamp": T0 - 600_000}])
            assert job.drain(90)
        batch = job.status()["batch"]
        wait_for("the oracle", lambda: oracle.status()["batch"] >= batch and oracle.status()["behind"] == 0)
        counted = int(job.status()["counted"])
        wait_for("the open windows", lambda: expected_in(settings, broker, "count") == counted)
        assert 15 <= expected_in(settings, broker, "outside") <= 17  # the last of those of old is too late
    finally:
        oracle.stop()
        job.stop()
    found = verdicts_of(settings, broker).tally(later_ms())
    assert found.wrong == 0 and found.verified + found.late >= 1, found.first_wrong
    report = audit(settings, broker)
    total = sum(world.rounds[2].values())
    assert report.verdict == "agreed", report.findings
    assert report.records == {"expected": total, "found": total, "outside": 18, **dict.fromkeys(KINDS, 0)}
    assert report.windows["wrong"] == 0 and report.windows["checked"] > 3

    ledger = list(read_topic(broker, settings.outside_topic))
    assert len(ledger) == 18
    values = {(r.partition, r.offset): r for r in read_topic(broker, settings.ratings_topic)}
    place = json.loads(ledger[0].value or b"")
    assert values[place["partition"], place["offset"]].key == str(place["userId"])
    told = Explainer(settings, broker).by_offset(place["partition"], place["offset"])
    assert (told["foreign"], told["outside"]) == (True, True)

    # live health, from the topics alone: nothing is held against the shards
    store = MetricsStore(tuple(s.name for s in window_specs(settings)))
    feed = Feed(settings, broker, store, SystemClock())
    feed.start()
    try:
        wait_for("the feed", lambda: store.job_status(T0).get("state") == "stopped" and store.outside())
        wait_for("the ledger", lambda: sum(store.outside().values()) == 18)
        assert store._surplus == {}
    finally:
        feed.stop()
