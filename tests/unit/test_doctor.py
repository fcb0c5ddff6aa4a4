"""What doctor says of a machine before a start; a start refuses what doctor calls a problem."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_pipeline import doctor, ports
from ray_pipeline.cluster import directory, head, runtime
from ray_pipeline.command.sparkjob import ray_address
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.doctor import Finding, examine
from ray_pipeline.errors import ConfigurationError, EnvironmentProblem
from ray_pipeline.kafka.client import RIGHTS
from ray_pipeline.state import RunInfo, remember_run
from ray_pipeline.windows.marker import MARKER, marker_for
from ray_pipeline.windows.stage import _why


def found(settings: Settings, check: str) -> list[Finding]:
    return [finding for finding in examine(settings) if finding.check == check]


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch, nothing_is_started: None) -> None:
    """Looking for Java and its archives starts processes."""
    monkeypatch.setattr(doctor, "export_java_or_fail", lambda: "version 17")
    monkeypatch.setattr(doctor, "_jars", lambda: "")
    monkeypatch.setattr(doctor, "_classes", lambda: Finding("classes", "ok", ""))


@pytest.mark.parametrize(
    ("content", "level", "detail"),
    [
        (None, "problem", "No such file"),
        ("<allocations><pool", "problem", "cannot be read"),
        ('<allocations><pool name="streaming"/><pool name="mine"/></allocations>', "ok", "pools streaming, mine"),
    ],
)
def test_a_scheduler_file_must_be_one(tmp_path: Path, content: str | None, level: str, detail: str) -> None:
    file = tmp_path / "pools.xml"
    if content is not None:
        file.write_text(content)
    settings = load_settings(fair_scheduler_file=file, state_dir=tmp_path / "state", api_port=0, ui_port=0)
    (finding,) = found(settings, "scheduler")
    assert finding.level == level and detail in finding.detail and str(file) in finding.detail
    if level == "problem":
        with pytest.raises(ConfigurationError, match=r"pools\.xml.*--fair-scheduler-file"):
            doctor.require(settings, ("process",))


def test_one_port_is_not_given_twice(tmp_path: Path) -> None:
    settings = load_settings(api_port=18431, ui_port=18431, state_dir=tmp_path)
    assert "problem" in {finding.level for finding in found(settings, "ports")}
    with pytest.raises(EnvironmentProblem, match="18431 is given to both"):
        doctor.require(settings, ("serve",))
    for good in ({"ui_port": 0, "api_port": 0}, {"ui": False, "api_port": 0, "ui_port": 0}):
        assert {f.level for f in found(load_settings(state_dir=tmp_path, **good), "ports")} == {"ok"}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, int]]:
    """Addresses that somebody listens at."""
    listening: set[tuple[str, int]] = set()

    class Socket(contextlib.nullcontext[Any]):
        def __init__(self, *_: object) -> None:
            super().__init__(self)

        def setsockopt(self, *_: object) -> None:
            pass

        def bind(self, address: tuple[str, int]) -> None:
            if address in listening:
                raise OSError(98, "Address already in use")

    monkeypatch.setattr(ports.socket, "socket", Socket)
    return listening


def test_a_port_in_use_is_a_problem_that_names_its_option(tmp_path: Path, taken: set[tuple[str, int]]) -> None:
    settings = load_settings(state_dir=tmp_path, api_port=8100, ui_host="::1", ui_port=8101, broker_port=8102)
    assert [f.level for f in found(settings, "ports")] == ["ok", "ok", "ok"]
    taken |= {("127.0.0.1", 8100), ("::1", 8101), ("127.0.0.1", 8102)}
    told = found(settings, "ports")
    assert {f.level for f in told} == {"problem"}
    assert [f.detail for f in told] == [
        f"port {port} on {host} cannot be used (Address already in use)"
        for host, port in (("127.0.0.1", 8100), ("::1", 8101), ("127.0.0.1", 8102))
    ]
    assert [f.fix.split()[3] for f in told] == ["--api-port,", "--ui-port,", "--broker-port,"]
    with pytest.raises(EnvironmentProblem, match=r"port 8100 on 127\.0\.0\.1 cannot be used"):
        doctor.require(settings, ("serve",))


def test_the_port_of_a_broker_that_runs_or_is_somebody_elses_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: set[tuple[str, int]]
) -> None:
    monkeypatch.setattr(doctor, "check_broker", lambda *_, **__: None)
    monkeypatch.setattr(doctor, "partitions_of", lambda *_: {})
    monkeypatch.setattr(doctor, "missing_rights", lambda *_: ([], []))
    taken.add(("127.0.0.1", 8102))
    settings = load_settings(state_dir=tmp_path, api_port=0, ui_port=0, broker_port=8102)
    assert "problem" in {f.level for f in found(settings, "ports")}
    remember_run(tmp_path, RunInfo.of_this_process("127.0.0.1:8102", stages=("broker",)))
    for there in (settings, settings.model_copy(update={"bootstrap_servers": "kafka:9092"})):
        assert {f.level for f in found(there, "ports")} == {"ok"}


def test_the_embedded_broker_has_no_door_with_a_lock(tmp_path: Path) -> None:
    settings = load_settings(state_dir=tmp_path, api_port=0, ui_port=0, security_protocol="SSL")
    (finding,) = (f for f in found(settings, "broker") if f.level == "problem")
    assert "--bootstrap-servers" in finding.fix
    with pytest.raises(ConfigurationError, match="security_protocol=SSL is for brokers that are named"):
        doctor.require(settings, ("generate",))


@pytest.mark.parametrize(("free_mib", "level"), [(100, "problem"), (500, "warning"), (5000, "ok")])
def test_a_disk_that_is_nearly_full_is_told_and_a_start_on_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_mib: int, level: str
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_mib << 20))
    settings = load_settings(state_dir=tmp_path, api_port=0, ui_port=0)
    assert found(settings, "disk")[0].level == level
    if level != "problem":
        doctor.require(settings, ("generate", "process"))
        return
    for stages in (("generate",), ("process",)):
        with pytest.raises(EnvironmentProblem, match=r"0\.1 GiB free.*--state-dir"):
            doctor.require(settings, stages)
    # what is written elsewhere needs none of it
    monkeypatch.setattr(doctor, "check_broker", lambda *_, **__: None)
    elsewhere = {"bootstrap_servers": "kafka:9092", "checkpoint": "hdfs://namenode/checkpoint"}
    doctor.require(settings.model_copy(update=elsewhere), ("generate", "process"))


def test_a_state_directory_that_cannot_be_made_is_looked_at_all_the_same() -> None:
    settings = load_settings(state_dir="/proc/nowhere/deep", api_port=0, ui_port=0)
    assert found(settings, "state directory")[0].level == "problem"
    assert "/proc/nowhere/deep" in found(settings, "disk")[0].detail


@pytest.mark.parametrize(
    "refused", [PermissionError(13, "Permission denied"), OSError(116, "Stale file handle")], ids=["denied", "stale"]
)
def test_a_disk_that_cannot_be_looked_at_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: OSError
) -> None:
    def refuse(_: object) -> None:
        raise refused

    monkeypatch.setattr(doctor.shutil, "disk_usage", refuse)
    (finding,) = found(load_settings(state_dir=tmp_path, api_port=0, ui_port=0), "disk")
    assert finding.level == "problem" and str(refused.strerror) in finding.detail and "--state-dir" in finding.fix


@pytest.mark.parametrize(("free", "level"), [(0.5, "problem"), (64.0, "ok")])
def test_the_cpus_of_a_named_cluster_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, level: str
) -> None:
    joined: list[str] = []

    @contextlib.contextmanager
    def join(address: str) -> Iterator[None]:
        joined.append(address)
        yield

    class Ray:
        @staticmethod
        def available_resources() -> dict[str, Any]:
            return {"CPU": free}

    monkeypatch.setattr(directory, "joined_cluster", join)
    monkeypatch.setattr(runtime, "ray", Ray)
    (finding,) = found(load_settings(ray_address="10.0.0.1:6379", state_dir=tmp_path), "cpus")
    assert finding.level == level and joined == ["10.0.0.1:6379"]
    assert "3.5 CPUs" in finding.detail
    (finding,) = found(load_settings(ray_address="local", state_dir=tmp_path), "cpus")
    assert "this machine" in finding.detail and len(joined) == 1  # a start makes that one: there is none to ask


@pytest.mark.parametrize(
    ("given", "environment", "joined"),
    [
        (None, None, None),
        (None, "", None),
        (None, "local", None),
        ("local", None, None),
        ("local", "10.0.0.1:6379", None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", "local", "auto"),
    ],
)
def test_doctor_and_start_agree_on_which_cluster_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, environment: str | None, joined: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # which a start sets, where nobody has
    inits: list[str] = []
    free = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda *, address, **_: inits.append(address),
        available_resources=lambda: {"CPU": 64.0},
        shutdown=lambda: None,
        _private=SimpleNamespace(services=SimpleNamespace(ConsolePopen=object)),
    )
    for module in (runtime, directory):
        monkeypatch.setattr(module, "ray", free)
    monkeypatch.setattr(runtime, "require_head", lambda _: None)
    monkeypatch.setattr(runtime, "take_session", lambda: None)
    settings = load_settings(ray_address=given, state_dir=tmp_path)
    start = runtime.RayRuntime(settings)
    start.start()
    assert (start.local, inits) == (joined is None, [joined or "local"])
    (finding,) = found(settings, "cpus")
    assert (f"the Ray cluster at {joined}" if joined else "this machine") in finding.detail
    assert inits[1:] == ([joined] if joined else [])
    assert ray_address(settings) == (given if given == joined else None)


@pytest.mark.parametrize(
    ("address", "host"), [("10.0.0.1:6379", "10.0.0.1"), ("[::1]:6379", "::1"), ("ray://head:6379", "head")]
)
def test_a_cluster_that_is_not_there_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, host: str
) -> None:
    """By doctor and by run: Ray itself tries for two minutes."""

    def refuse(place: tuple[str, int], timeout_s: float) -> None:
        assert place == (host, 6379) and timeout_s < 5
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(head.socket, "create_connection", refuse)
    monkeypatch.setattr(runtime, "ray", SimpleNamespace(is_initialized=lambda: False))  # which cannot be asked to join
    settings = load_settings(ray_address=address, state_dir=tmp_path)
    (finding,) = found(settings, "cpus")
    with pytest.raises(EnvironmentProblem) as told:
        runtime.RayRuntime(settings).start()
    assert finding.level == "problem" and (finding.detail, finding.fix) == (told.value.problem, told.value.fix)
    assert f"{settings.ray_address} cannot be joined: nobody answers (Connection refused)" in finding.detail
    assert "--ray-address" in finding.fix


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({}, "reset --state-dir {tmp}"),
        ({"bootstrap_servers": "kafka:9092"}, "--bootstrap-servers"),
        # reset leaves what is not in the state directory
        ({"checkpoint": "file://{tmp}/mine"}, "remove file://{tmp}/mine"),
    ],
)
def test_the_way_out_of_a_checkpoint_of_other_windows_leads_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], fix: str
) -> None:
    monkeypatch.setattr(doctor, "check_broker", lambda *_, **__: None)
    monkeypatch.setattr(doctor, "partitions_of", lambda *_: {})
    monkeypatch.setattr(doctor, "missing_rights", lambda *_: ([], []))
    here = {name: value.replace("{tmp}", str(tmp_path)) for name, value in changes.items()}
    settings = load_settings(state_dir=tmp_path, tumbling_s=30, **here)
    folder = Path(settings.checkpoint_uri.removeprefix("file://"))
    folder.mkdir()
    (folder / MARKER).write_text(json.dumps(marker_for(load_settings())))
    (finding,) = found(settings, "checkpoint")
    assert finding.level == "problem" and "tumbling_s was 60, is 30" in finding.detail
    assert fix.replace("{tmp}", str(tmp_path)) in finding.fix and "another --checkpoint" in finding.fix
    fatal, reason = _why("[KAFKA_DATA_LOSS.ADDED] …", settings)
    assert fatal and fix.replace("{tmp}", str(tmp_path)) in reason


@pytest.mark.parametrize(
    "line",
    [
        "org.apache.kafka.common.errors.TopicAuthorizationException: Not authorized to access topics: [ratings]",
        "ray_pipeline.errors.NotAllowedError: windows could not be published to topic x: Broker: Topic authorization failed",
    ],
)
def test_the_job_does_not_begin_again_where_a_right_is_missing(line: str) -> None:
    fatal, reason = _why(f"[STREAM_FAILED] Query terminated\n\tat x.y\n{line}\n\tat z", load_settings())
    assert fatal and reason.startswith(line) and RIGHTS in reason
