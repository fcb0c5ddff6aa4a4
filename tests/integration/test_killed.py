"""What a run leaves behind that was killed: an audit agrees, and the next broker and all readers get on."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ray_pipeline.config import load_settings
from ray_pipeline.errors import EnvironmentProblem
from ray_pipeline.kafka import broker as embedded
from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.read import held_up, read_compacted
from ray_pipeline.kafka.topics import ensure_topics
from tests.conftest import Running, clean_environment, command, has_ended, wait_for


@pytest.mark.timeout(400)
@pytest.mark.parametrize("part", ["run", "raylet"])
def test_an_audit_right_after_the_run_or_its_ray_was_killed_agrees(starter: Callable[..., Running], part: str) -> None:
    running = starter(
        "run", *shlex.split("--rate 1000 --no-ui --api-port 0 --tumbling 5 --sliding 10 --slide 5 --watermark 5")
    )
    bootstrap = running.info()["bootstrap"]

    def in_windows() -> int:
        return int(read_compacted(bootstrap, "metrics.progress").get("job", {}).get("counted", 0))

    wait_for("some windows", lambda: in_windows() > 3_000, 120)
    run = psutil.Process(running.process.pid)
    children = run.children(recursive=True)
    victim = run if part == "run" else next(process for process in children if process.name() == part)
    victim.kill()
    code = running.process.wait(60)
    assert code == (-signal.SIGKILL if part == "run" else 1), running.text
    done = command("audit", "--json", "--state-dir", running.state_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["records"]["found"] > 3_000 and found["windows"]["checked"] > 0
    assert part == "run" or "raylet" in running.text
    for process in children:  # they end by themselves, which the storm looks at: after a minute
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


START_BROKER = """
import sys, time
from pathlib import Path
from ray_pipeline.kafka.broker import EmbeddedBroker
broker = EmbeddedBroker(Path(sys.argv[1]))
broker.start()
print(broker.pid, broker.bootstrap_servers, flush=True)
time.sleep(600)
"""


def test_a_broker_waits_for_the_one_of_a_run_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", START_BROKER, tmp_path], stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    assert run.stdout is not None
    with run.stdout as said:
        pid, bootstrap = said.readline().split()
    left = psutil.Process(int(pid))
    try:
        with pytest.raises(EnvironmentProblem, match=f"in use by process {run.pid}"):
            EmbeddedBroker(tmp_path).start()
        os.kill(left.pid, signal.SIGSTOP)  # it is told to end, and cannot
        run.kill()
        run.wait()
        monkeypatch.setattr(embedded, "_PREDECESSOR_S", 1.0)
        with pytest.raises(EnvironmentProblem, match=f"does not end .process {pid}.*kill -9 {pid}"):
            EmbeddedBroker(tmp_path).start()
        monkeypatch.undo()
        os.kill(left.pid, signal.SIGCONT)
        broker = EmbeddedBroker(tmp_path)
        broker.start()
        assert has_ended(left) and broker.bootstrap_servers == bootstrap
        broker.stop()
    finally:
        run.kill()
        run.wait()
        if not has_ended(left):
            left.kill()


def test_nobody_waits_for_ever_for_a_transaction_whose_sender_and_broker_are_gone(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path)
    broker.start()
    settings = load_settings(state_dir=tmp_path, partitions=1, actors=1)
    ensure_topics(settings, broker.bootstrap_servers)
    sender = make_producer(broker.bootstrap_servers, transactional_id="gone", transaction_timeout_ms=10_000)
    sender.init_transactions(30)
    sender.begin_transaction()
    sender.produce(settings.ratings_topic, b"never committed", partition=0)
    assert sender.flush(30) == 0
    place = (broker.bootstrap_servers, settings.ratings_topic)
    assert held_up(*place) == [0]
    broker.stop()
    del sender
    broker.start()
    try:
        wait_for("readers to be let past it", lambda: not held_up(*place))
    finally:
        broker.stop()
