"""Delivery over links that are slow, cut, or half open: all of it arrives once, in order, and what was not committed is not seen."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from ray_pipeline.chaos.proxy import FaultProxy
from ray_pipeline.clock import SystemClock
from ray_pipeline.codec import encode_values
from ray_pipeline.config import load_settings
from ray_pipeline.delivery.factory import open_delivery
from ray_pipeline.delivery.interface import Epoch
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.event_clock import EventClock
from ray_pipeline.generator.plan import RatePlan, ShardSchedule
from ray_pipeline.generator.runner import Assignment, RunnerState, ShardRunner
from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.read import read_topic
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.ports import any_free_port
from ray_pipeline.restart import RestartPolicy
from ray_pipeline.truth.replay import build_models
from tests.conftest import wait_for

pytestmark = pytest.mark.timeout(240)

RATE = 500.0
COUNT = 6_000


def disturb(proxy: FaultProxy, draw: random.Random) -> None:
    """Links break in the middle of things, are slow, or take everything and answer nothing."""
    for kind in draw.sample(["cut", "slow", "half open", "cut", "half open", "cut"], 6):
        if kind == "cut":
            proxy.cut()
        elif kind == "slow":
            proxy.delay_s = 0.1
        else:
            proxy.half_open = True
        time.sleep(draw.uniform(0.2, 1.5))
        proxy.delay_s, proxy.half_open = 0.0, False


def test_all_arrives_once_and_in_order_over_bad_links(tmp_path: Path) -> None:
    port = any_free_port("127.0.0.1")
    with FaultProxy(port) as proxy:
        broker = EmbeddedBroker(tmp_path, port, advertised_port=proxy.port)
        broker.start()
        through = f"127.0.0.1:{proxy.port}"
        settings = load_settings(state_dir=tmp_path, partitions=1, actors=1, users=500, movies=200)
        model = build_models(settings, load_catalogue(settings), [0])[0]
        runner = ShardRunner(
            0, lambda: model, lambda: open_delivery(settings, through, 0), 100, SystemClock(), RestartPolicy()
        )
        try:
            ensure_topics(settings, broker.bootstrap_servers)
            start_ms = SystemClock().now_ms()
            plan = (Epoch(start_ms, RATE),)
            runner.start()
            runner.tell(Assignment(1, "run", "config", plan, 1.0, 0.5, COUNT, EventClock()))
            wait_for("the first commit", lambda: runner.report().next_index > 0)
            draw = random.Random(1)
            while runner.report().state is not RunnerState.DONE:
                assert runner.report().state is not RunnerState.FAILED, runner.report().error
                assert SystemClock().now_ms() < start_ms + 180_000, runner.report()
                runner.tell(None)
                if runner.report().next_index < COUNT / 2:
                    disturb(proxy, draw)
                time.sleep(0.2)
            found = [record.value for record in read_topic(broker.bootstrap_servers, settings.ratings_topic)]
        finally:
            runner.stop()
            runner.join(30)
            broker.stop()
        assert proxy.connections > 10
    times = ShardSchedule(RatePlan(plan), 1.0, 0.5).due_ms(0, COUNT)
    drawn = model.draw(0, COUNT)
    assert found == encode_values(EventBatch(0, 0, drawn.user_ids, drawn.movie_ids, drawn.half_stars, times))
