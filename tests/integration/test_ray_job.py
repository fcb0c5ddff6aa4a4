"""As a Ray job with token authentication, on a cluster of two nodes; and the cluster file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ray_pipeline.errors import BrokerUnavailableError
from ray_pipeline.kafka.read import count_records, read_compacted
from ray_pipeline.ports import any_free_port
from tests.conftest import clean_environment, command, wait_for

pytestmark = pytest.mark.timeout(400)

_RAY_TMPDIR = "/tmp/ray-pipeline-test"  # Ray remembers there which cluster was started last
_BIN = Path(sys.executable).parent
_ROOT = Path(__file__).parents[2]


@dataclass
class Cluster:
    """Two raylets on this machine."""

    address: str
    dashboard: str
    environment: dict[str, str]


def starting(output: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    with output.open("w") as file:
        return subprocess.Popen(
            [
                *(_BIN / "ray", "start", "--block", "--disable-usage-stats", "--node-ip-address", "127.0.0.1"),
                # by default a port that every Ray on the machine wants, and jobs go to whoever got it
                *("--dashboard-agent-listen-port", str(any_free_port("127.0.0.1")), *arguments),
            ],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text("0123456789abcdef0123456789abcdef")
    environment = {
        **clean_environment(),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
    }
    port, dashboard = any_free_port("127.0.0.1"), any_free_port("127.0.0.1")
    nodes = []
    try:
        nodes.append(
            starting(
                folder / "head.txt",
                environment,
                *("--head", "--port", str(port), "--num-cpus", "2", "--dashboard-port", str(dashboard)),
                *("--ray-client-server-port", str(any_free_port("127.0.0.1")), "--temp-dir", f"{_RAY_TMPDIR}/ray"),
            )
        )
        wait_for("the head", lambda: "Ray runtime started" in (folder / "head.txt").read_text(), 60)
        # Spark's executor wants two CPUs, which only the second node has free: API and oracle run on the head
        # and a folder of its own, as on a machine of its own: each node begins the job's files anew in its folder
        own = ("--num-cpus", "4", "--temp-dir", f"{_RAY_TMPDIR}/ray-2")
        nodes.append(starting(folder / "worker.txt", environment, "--address", f"127.0.0.1:{port}", *own))
        wait_for("the second node", lambda: "Ray runtime started" in (folder / "worker.txt").read_text(), 60)
        cluster = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
        # the agents that take jobs come up after the nodes
        wait_for("a job to be taken", lambda: submit(cluster, "true").returncode == 0, 90)
        yield cluster
    finally:
        for node in nodes:
            node.send_signal(signal.SIGTERM)  # each may take half a minute to drain
        for node in nodes:
            node.wait(60)


def count_of(broker: str, topic: str) -> int:
    """Ratings in a topic; 0 also where it does not exist yet."""
    try:
        return count_records(broker, topic).total
    except BrokerUnavailableError:
        return 0


def submit(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [_BIN / "ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--", *arguments],
        cwd=_ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def nodes_of(cluster: Cluster, class_name: str) -> set[str]:
    """Where Ray has, or had, actors of a class."""
    done = subprocess.run(
        [
            *(_BIN / "ray", "list", "actors", "--address", cluster.dashboard, "--format", "json", "--limit", "1000"),
            *("--filter", f"class_name={class_name}"),
        ],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return {actor["node_id"] for actor in json.loads(done.stdout)}


def test_a_checkout_is_sent_along_and_what_was_made_in_it_is_not(cluster: Cluster) -> None:
    sent = "import pathlib, ray_pipeline as r; print('FROM', r.__file__, *sorted(p.name for p in pathlib.Path().iterdir()))"
    done = submit(cluster, "python", "-c", sent)
    line = next(line for line in done.stdout.splitlines() if line.startswith("FROM "))
    _, package, *names = line.split()
    assert "_ray_pkg_" in package, "the job does not run what was sent"
    assert {"ray_pipeline", "spark_compat", "cluster.yaml"} <= set(names)
    assert not {".git", ".venv", ".mypy_cache", ".pytest_cache", "test-results"} & set(names)


def test_the_pipeline_runs_as_a_ray_job_on_two_nodes(cluster: Cluster, broker: str, tmp_path: Path) -> None:
    names = {"ratings": "job2.ratings", "metrics": "job2.metrics", "progress": "job2.progress", "job": "job2.job"}
    topics = [part for name, topic in names.items() for part in (f"--{name}-topic", topic)]
    summary = tmp_path / "summary.json"
    done = submit(
        cluster,
        *("ray-pipeline", "run", "--duration", "8", "--rate", "500", "--bootstrap-servers", broker),
        *("--actors", "4", "--ui-port", "0", "--api-port", "0", "--state-dir", str(tmp_path), *topics),
        *("--summary-json", str(summary)),
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "succeeded" in output and "Summary" in output
    found = json.loads(summary.read_text())
    assert found["requested"] == found["delivered"] == found["counted"] == 4000
    assert count_records(broker, names["ratings"]).total == 4000
    actors = read_compacted(broker, names["progress"])["generator"]["actors"]
    nodes = {actor["node"] for actor in actors}
    assert len(nodes) == 2, "the actors share one node"
    executors = nodes_of(cluster, "org.apache.spark.executor.RayDPExecutor")
    assert len(executors) == 1 and executors < nodes, "the executor has a node, and there is an actor on another one"


def test_of_several_pipelines_on_one_cluster_the_one_that_is_named_is_stopped(
    cluster: Cluster, broker: str, tmp_path: Path
) -> None:
    """Two generators and a Spark job, all with one control topic."""
    token = {name: value for name, value in cluster.environment.items() if name.startswith("RAY_AUTH")}
    running: dict[str, subprocess.Popen[bytes]] = {}
    at = ("--ray-address", cluster.address)

    def start(name: str, what: str, topics: str, *more: str) -> None:
        named = ("--ratings-topic", f"{topics}.ratings", "--progress-topic", f"{topics}.progress")
        where = ("--bootstrap-servers", broker, *at, "--state-dir", tmp_path / name)
        arguments = (_BIN / "ray-pipeline", what, *named, *more, *where)
        running[name] = subprocess.Popen(arguments, env=cluster.environment)

    def stop(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        rows = json.loads(command("jobs", "list", "--json", *at, **token).stdout)
        row = next(row for row in rows if row["pid"] == running[name].pid)
        return command("jobs", "stop", row["name"], *more, *at, **token)

    try:
        for name in ("first", "second"):
            start(name, "generate", name, "--rate", "20")
            wait_for(f"the {name} one", lambda name=name: count_of(broker, f"{name}.ratings") > 0, 90)
        start("windows", "process", "second", "--job-topic", "windows.job", "--metrics-topic", "windows.metrics")
        wait_for("windows", lambda: count_of(broker, "windows.metrics") > 0, 120)
        rows = json.loads(command("jobs", "list", "--json", *at, **token).stdout)
        found = {row["pid"]: (row["stages"], row["generator"], row["job"].get("state")) for row in rows}
        assert found == {
            running["first"].pid: (["generate"], {"state": "running", "actors": 2}, None),
            running["second"].pid: (["generate"], {"state": "running", "actors": 2}, None),
            running["windows"].pid: (["process"], {}, "running"),
        }
        for name in ("windows", "first"):
            done = stop(name)
            assert done.returncode == 0 and "has stopped" in done.stdout, done.stderr
            assert (
                running[name].wait(30) == 0
            )  # it may be on the other raylet than the command: then its actors' end counts
        before = count_of(broker, "second.ratings")
        wait_for("the second one goes on", lambda: count_of(broker, "second.ratings") > before + 20)
        late = stop("second", "--wait", "0")
        assert late.returncode == 7 and "has not ended within 0 s" in late.stderr, late.stderr
        assert running["second"].wait(60) == 0
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def test_a_run_that_names_no_cluster_joins_none_that_happens_to_be_there(
    cluster: Cluster, broker: str, tmp_path: Path
) -> None:
    topics = [part for topic in ("ratings", "progress", "control") for part in (f"--{topic}-topic", f"own.{topic}")]
    flags = ("--ratings", "10", "--bootstrap-servers", broker, "--state-dir", tmp_path, *topics)
    done = command("generate", *flags, RAY_TMPDIR=_RAY_TMPDIR)
    assert done.returncode == 0, done.stdout + done.stderr
    assert count_records(broker, "own.ratings").total == 10


def test_a_cluster_that_is_too_small_is_said_at_once(cluster: Cluster, broker: str, tmp_path: Path) -> None:
    done = submit(
        cluster,
        *("ray-pipeline", "run", "--ratings", "5", "--executors", "9", "--bootstrap-servers", broker),
        *("--ui-port", "0", "--api-port", "0", "--state-dir", str(tmp_path)),
    )
    assert done.returncode != 0
    assert re.search(r"has [\d.]+ CPUs free, the pipeline needs", done.stdout + done.stderr)


def test_the_cluster_file_is_valid_and_sets_up_every_node() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((_ROOT / "cluster.yaml").read_text())
    assert "available_node_types" not in config
    validate_config(prepare_config(config))
    setup = "\n".join(config["setup_commands"])
    assert "openjdk-17" in setup and "make install" in setup
    # Ray starts nowhere with token authentication and no token, nor do nodes with different ones find each other
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert any("RAY_AUTH_MODE=token ray start" in c for c in config[commands])
