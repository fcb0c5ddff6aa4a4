"""Bad input: one line that names the setting and the fix, and an exit code that is not 0."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.errors import BrokerUnavailableError
from ray_pipeline.kafka.client import check_broker
from tests.conftest import clean_environment, command


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--rate", "0"], 2, "rate"),
        (["--rate", "quick"], 2, "rate"),
        (["--duration", "5", "--ratings", "5"], 2, "duration_s and ratings exclude"),
        (["--partitions", "2", "--actors", "3"], 2, "partitions=2"),
        (["--bootstrap-servers", "127.0.0.1:1"], 4, "127.0.0.1:1"),
        (["--ray-address", "127.0.0.1:1"], 3, "127.0.0.1:1 cannot be joined"),
        (["--catalog", "{tmp}/movies.csv"], 2, "line 3"),
        (["--config", "{tmp}/settings.toml"], 2, "'rte'"),
        (["--config", "{tmp}/none.toml"], 2, "does not exist"),
        (["--state-dir", "/proc/nowhere"], 3, "--state-dir"),
        (["--colour", "red"], 2, "colour"),
    ],
)
def test_run_refuses(tmp_path: Path, arguments: list[str], code: int, named: str) -> None:
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,A (1990),Drama\nx,B (1991),Comedy\n")
    (tmp_path / "settings.toml").write_text("rte = 5\n")
    filled = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    state = [] if "--state-dir" in filled else ["--state-dir", str(tmp_path / "state")]
    done = command("run", "--api-port", "0", "--ui-port", "0", *filled, *state, timeout_s=60)
    assert done.returncode == code, done.stdout + done.stderr
    assert named in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "state" / "broker").exists()  # it ended before anything was started


def test_a_broker_of_this_machine_that_nobody_is_is_told_at_once_unless_it_is_starting() -> None:
    def waited_s(**how: Any) -> float:
        began = time.monotonic()
        with pytest.raises(
            BrokerUnavailableError, match=r"no Kafka broker answers at 127\.0\.0\.1:1 .*--bootstrap-servers"
        ):
            check_broker("127.0.0.1:1", **how)
        return time.monotonic() - began

    assert waited_s() < 5  # not as long as a broker far away may take
    assert waited_s(timeout_s=3.0, starting=True) > 2.9


@pytest.mark.parametrize("what", ["accepts and never answers", "does not even accept"])
def test_a_host_that_neither_answers_nor_refuses_is_given_up_within_15_s(tmp_path: Path, what: str) -> None:
    with contextlib.ExitStack() as held:
        silent = held.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = silent.getsockname()[1]
        if what == "does not even accept":
            held.enter_context(socket.create_connection(("127.0.0.1", port)))  # no room for another one
        else:
            silent.listen(100)
        began = time.monotonic()
        with pytest.raises(BrokerUnavailableError):
            check_broker(f"127.0.0.1:{port}")
        took_s = time.monotonic() - began
        done = command("run", "--bootstrap-servers", f"127.0.0.1:{port}", "--state-dir", tmp_path / "state")
    assert done.returncode == 4 and f"no Kafka broker answers at 127.0.0.1:{port}" in done.stderr, done.stderr
    assert "--bootstrap-servers" in done.stderr and "Traceback" not in done.stderr
    assert took_s < 10  # the rest is the start of an interpreter


def test_java_missing_or_too_old(tmp_path: Path) -> None:
    done = command("run", "--state-dir", tmp_path, JAVA_HOME=str(tmp_path))
    assert done.returncode == 3 and "JAVA_HOME" in done.stderr
    old = tmp_path / "old" / "bin" / "java"
    old.parent.mkdir(parents=True)
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    old.chmod(0o755)
    done = command("run", "--state-dir", tmp_path, JAVA_HOME=str(tmp_path / "old"))
    assert done.returncode == 3 and "version 11, too old: 17" in done.stderr
    done = command("doctor", "--state-dir", tmp_path, JAVA_HOME=str(tmp_path / "old"))
    assert done.returncode == 1 and "problem" in done.stdout and "apt-get install" in done.stdout


def test_doctor_finds_this_machine_well(tmp_path: Path) -> None:
    done = command("doctor", "--api-port", "0", "--ui-port", "0", "--state-dir", tmp_path)
    assert done.returncode == 0, done.stdout
    for check in ("java", "versions", "jars", "ports", "disk", "memory", "cpus", "broker", "checkpoint", "catalogue"):
        assert f" {check}: " in done.stdout


@pytest.mark.parametrize("arguments", [["rate", "5"], ["pause"], ["status"], ["generate"], ["serve"], ["process"]])
def test_nothing_runs_here(tmp_path: Path, arguments: list[str]) -> None:
    done = command(*arguments, "--state-dir", tmp_path)
    assert done.returncode == 2 and "--bootstrap-servers" in done.stderr, done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "nan", "lots"])
def test_a_bad_rate(tmp_path: Path, value: str) -> None:
    done = command("rate", "--state-dir", tmp_path, "--", value)
    assert done.returncode == 2 and "above 0" in done.stderr


def test_a_topic_that_is_not_there(broker: str, tmp_path: Path) -> None:
    done = command("topics", "count", "nothing", "--bootstrap-servers", broker, "--state-dir", tmp_path)
    assert done.returncode == 4 and "nothing" in done.stderr


def test_the_package_and_its_pure_core_load_neither_ray_nor_spark() -> None:
    program = """
import sys
import ray_pipeline, ray_pipeline.events, ray_pipeline.codec, ray_pipeline.windows.reference
from ray_pipeline.model import population, ratings, catalogue
from ray_pipeline.config import load_settings
from ray_pipeline.generator import shard, runner, worker, coordination
s = load_settings(users=100, movies=50)
movies = population.build_movies(s, catalogue.load_catalogue(s))
users = population.build_users(s, population.build_user_map(s).users_of(0))
assert len(ratings.ShardModel(s, 0, users, movies).draw(0, 10).user_ids) == 10
loaded = {"ray", "pyspark", "raydp", "confluent_kafka", "gradio", "fastapi"} & set(sys.modules)
assert not loaded, loaded
assert ray_pipeline.__all__ == sorted(ray_pipeline.__all__)
ray_pipeline.Pipeline
assert "ray" not in sys.modules and "pyspark" not in sys.modules
"""
    environment = {**clean_environment(), "PATH": os.path.dirname(sys.executable), "JAVA_HOME": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
