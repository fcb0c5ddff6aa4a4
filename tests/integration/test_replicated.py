"""Three brokers, and one of them dies for good: ratings and windows go on, and each rating is there once."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.errors import BrokerUnavailableError
from ray_pipeline.kafka.read import newest_of_key
from tests.conftest import Running, command, wait_for
from tests.replicated import ReplicatedBrokers

pytestmark = pytest.mark.timeout(300)

FLAGS = """
    --rate 300 --replication-factor 3 --no-ui --api-port 0 --tumbling 5 --sliding 10 --slide 5 --watermark 5
"""
GONE_S = 40
"""How soon after the death windows hold what was sent after it, at most: it is some seconds, and a minute where Spark goes on asking
the dead one."""


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[ReplicatedBrokers]:
    started = ReplicatedBrokers(tmp_path)
    yield started
    started.stop()


def test_one_of_three_brokers_dies_and_the_stream_and_its_windows_go_on(
    starter: Callable[..., Running], brokers: ReplicatedBrokers
) -> None:
    bootstrap = brokers.bootstrap_servers
    where = ("--bootstrap-servers", bootstrap)
    running = starter("run", *where, *shlex.split(FLAGS))
    running.info()

    def said(topic: str, key: str) -> dict[str, Any]:
        value = newest_of_key(bootstrap, topic, key, 30.0, committed=False)
        return dict(json.loads(value)) if value else {}

    def counted() -> int:
        with contextlib.suppress(BrokerUnavailableError):  # as it may be in the very moment of a death
            return int(said("metrics.progress", "job").get("counted", 0))
        return 0

    wait_for("some windows", lambda: counted() > 1_000, 120)
    assert brokers.in_sync("ratings") == {3}
    victim = next(leader for p in range(4) if (leader := brokers.leader("ratings", p)) != 1)
    delivered = int(said("ratings.progress", "generator")["delivered"])
    brokers.nodes[victim].kill()
    wait_for("windows of what was sent since", lambda: counted() > delivered + 600, GONE_S)
    wait_for("the copies to be fewer", lambda: brokers.in_sync("ratings") == {2}, 30)

    def again() -> dict[str, object] | None:
        found = said("metrics.progress", "job")
        return found if found["state"] == "running" and found["lag"] < 3_000 else None

    job = wait_for("the lag to be small again", again)
    wait_for("the lag to be told anew", lambda: said("metrics.progress", "job")["lag"] != job["lag"], 30)

    assert running.end() == 0, running.text
    done = command("audit", "--json", *where)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "agreed" and found["records"]["found"] > 2_000 and found["windows"]["checked"] > 2
