"""The command line: what its help says, which settings a stage alone takes from the topic, and what is refused before any work."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from ray_pipeline.__main__ import app
from ray_pipeline.brokers import Brokers
from ray_pipeline.clock import FakeClock
from ray_pipeline.cluster import runtime
from ray_pipeline.command import running
from ray_pipeline.config import Settings, flag_of, load_settings
from ray_pipeline.errors import EnvironmentProblem, ProcessingError, RayPipelineError, StageFailedError
from ray_pipeline.kafka.supervisor import BrokerSupervisor
from ray_pipeline.knobs import knob_of
from ray_pipeline.pipeline import Pipeline, Status, Summary
from ray_pipeline.state import RunInfo, claimed_stage, remember_run

WITH_SETTINGS = (
    *("run", "broker", "generate", "process", "serve", "verify", "rate 5", "plan x", "pause", "resume", "scale 2"),
    *("status", "scoreboard", "batch", "doctor", "reset", "audit", "conformance", "explain", "grade", "chaos", "fit x"),
    *("backfill", "topics count x", "topics tail x", "jobs list", "jobs stop x"),
)


def call(*arguments: str, columns: int = 500) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns)})


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_help_shows_the_default_of_each_setting_with_its_unit(name: str) -> None:
    said = call(*name.split(), "--help").stdout
    knobs = {flag_of(setting): knob_of(setting) for setting in Settings.model_fields}
    shown = {flag: line for line in said.splitlines() for flag in re.findall(r"--[a-z-]+", line)[:1] if flag in knobs}
    assert "--config" in said and shown
    for flag, line in shown.items():
        default = knobs[flag].default
        if default not in (None, (), "") and knobs[flag].help in line:  # else it is an option of the command's own
            assert "[default: " in line, line
            if not isinstance(default, bool):
                assert f"[default: {default} {knobs[flag].unit}".rstrip() in line, line


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_help_can_be_read_on_a_narrow_terminal(name: str) -> None:
    """No option, choice or word of what they mean is cut."""
    wide, narrow = (call(*name.split(), "--help", columns=columns).stdout for columns in (500, 80))
    assert max(map(len, narrow.splitlines())) <= 80
    shown = set(re.findall(r"--[a-z-]+[…]?", narrow))
    assert "--config" in shown and shown == set(re.findall(r"--[a-z-]+", wide))
    words = set(re.split(r"[\s│|;]+", narrow))
    for setting in Settings.model_fields:
        knob = knob_of(setting)
        if flag_of(setting) in shown and knob.help in wide:
            assert set(map(str, (*knob.choices, *re.split(r"[\s;]+", knob.help)))) <= words, setting


def test_help_says_what_a_user_looks_for() -> None:
    said = call("run", "--help").stdout
    for default in ("default: 100.0", "default: 60 s", "default: 100 ms", "default: no-fast", "default: exactly-once"):
        assert f"[{default}]" in said
    assert "[default: as many as pay]" in call("audit", "--help").stdout
    assert "[default: as suits]" in call("backfill", "--help").stdout
    assert "[default: all]" in call("chaos", "--help").stdout


@pytest.mark.parametrize(
    ("given", "taken"), [({}, 8), ({"rate": 5}, 8), ({"partitions": 4}, 4), ({"preset": "quiet"}, 1)]
)
def test_a_stage_that_joins_a_stream_has_its_partitions_unless_told_others(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], taken: int
) -> None:
    monkeypatch.setattr(running, "check_broker", lambda *_, **__: None)
    monkeypatch.setattr(running, "partitions_of", lambda _, topics: dict.fromkeys(topics, 8))
    assert running._joining(load_settings(bootstrap_servers="a:1", **given)).partitions == taken
    monkeypatch.setattr(running, "partitions_of", lambda *_: {})  # the stage makes the topic
    assert running._joining(load_settings(bootstrap_servers="a:1", partitions=6)).partitions == 6


def test_the_embedded_broker_of_the_state_directory_is_spoken_to_in_clear_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Brokers] = []
    monkeypatch.setattr(running, "check_broker", lambda brokers, **_: asked.append(brokers))
    monkeypatch.setattr(running, "partitions_of", lambda *_: {})
    monkeypatch.setenv("RAY_PIPELINE_SECURITY_PROTOCOL", "SASL_SSL")
    for name, value in (("MECHANISM", "PLAIN"), ("USERNAME", "me"), ("PASSWORD", "hush")):
        monkeypatch.setenv(f"RAY_PIPELINE_SASL_{name}", value)
    settings = load_settings(state_dir=tmp_path)
    for stages, secured in ((("generate",), True), (("broker",), False)):
        remember_run(tmp_path, RunInfo.of_this_process("127.0.0.1:9", stages=stages))
        joined = running._joining(settings)
        assert joined.brokers is not None
        for brokers in (asked[-1], joined.brokers):
            assert brokers == "127.0.0.1:9" and bool(brokers.security) is secured


@pytest.mark.parametrize("stage", ["process", "serve", "verify", "backfill"])
def test_every_stage_can_be_told_the_partitions_that_an_error_names(stage: str) -> None:
    assert "--partitions" in call(stage, "--help").stdout


@pytest.fixture
def signals_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.StopSignal, "install", lambda _: None)


def run_to_file(tmp_path: Path, summary: Path) -> Result:
    flags = (
        "--sink",
        "ndjson",
        "--output",
        str(tmp_path / "ratings.ndjson"),
        "--ratings",
        "10",
        "--state-dir",
        str(tmp_path),
    )
    return call("run", *flags, "--users", "50", "--movies", "20", "--summary-json", str(summary))


@pytest.mark.usefixtures("signals_left_alone")
def test_a_summary_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    done = run_to_file(tmp_path, tmp_path / "missing" / "summary.json")
    assert done.exit_code == 2 and str(tmp_path / "missing") in done.stderr and "--summary-json" in done.stderr
    assert not (tmp_path / "ratings.ndjson").exists()
    assert run_to_file(tmp_path, tmp_path).exit_code == 2
    assert run_to_file(tmp_path, tmp_path / "summary.json").exit_code == 0
    assert json.loads((tmp_path / "summary.json").read_text())["delivered"] == 10


@pytest.mark.usefixtures("signals_left_alone")
def test_a_summary_that_could_not_be_written_is_shown_and_told(tmp_path: Path) -> None:
    done = run_to_file(tmp_path, Path("/dev/full"))
    assert done.exit_code == 3 and "/dev/full" in done.stderr and "No space left" in done.stderr
    assert "delivered" in done.stdout and not isinstance(done.exception, OSError)


def test_times_are_counted_from_the_beginning_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age_s = running._process_age_s()
    assert age_s == pytest.approx(time.time() - psutil.Process().create_time(), abs=2.0)  # psutil's is of whole seconds
    pipeline = Pipeline(load_settings(state_dir=tmp_path), before_s=7.5)
    monkeypatch.setattr(pipeline, "_start", lambda: None)
    pipeline.start()
    assert pipeline.timings["imports"] == 7.5 and 7.5 <= pipeline._elapsed() < 60
    from_python = Pipeline(load_settings(state_dir=tmp_path))
    monkeypatch.setattr(from_python, "_start", lambda: None)
    from_python.start()
    assert "imports" not in from_python.timings


# -- the status line


@pytest.mark.parametrize(
    ("stages", "changes", "said"),
    [
        (("generate",), {"behind_s": 12.34}, "running | target 500/s, delivered 480.5/s (12,345) | behind by 12.3 s"),
        (("generate",), {"behind_s": 0.9}, "running | target 500/s, delivered 480.5/s (12,345)"),
        (
            ("generate",),
            {"behind_s": 99.0, "state": "backfilling", "event_reached_ms": 0},
            "backfilling | target 500/s, delivered 480.5/s (12,345) | event time 1970-01-01T00:00:00.000Z",
        ),
        (("process",), {"behind_s": 12.34}, "running | windows 3, lag 1,000, batch 250 ms"),
    ],
)
def test_the_status_line_says_how_far_the_generator_is_behind(
    monkeypatch: pytest.MonkeyPatch, stages: tuple[str, ...], changes: dict[str, Any], said: str
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(running, "say", lines.append)
    monkeypatch.setattr(running, "_STATUS_EVERY_S", 0.0)
    status = Status("running", 500.0, 480.5, 12_345, 3, 1_000, 0.0, None, 250, None, 0)
    running._StatusLine(stages)(replace(status, **changes))
    assert lines == [said]


# -- signals


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[running.StopSignal, FakeClock]]:
    """A signal's handler that is installed, and its clock; the forced end raises SystemExit."""

    def forced(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", forced)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    clock = FakeClock()
    stop = running.StopSignal(clock=clock)
    stop.install()
    yield stop, clock
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_came_to_the_whole_group_and_is_passed_on_too_is_one(
    stop: tuple[running.StopSignal, FakeClock], capsys: pytest.CaptureFixture[str]
) -> None:
    signals, clock = stop
    signals.started()
    signal.raise_signal(signal.SIGTERM)
    assert signals.event.is_set()
    clock.advance(0.9)
    signal.raise_signal(signal.SIGTERM)
    assert capsys.readouterr().out.count("SIGTERM: stopping in order (again: at once)") == 1
    clock.advance(0.2)
    with pytest.raises(SystemExit, match="130"):
        signal.raise_signal(signal.SIGTERM)


def test_another_signal_is_a_second_one_however_soon_it_comes(stop: tuple[running.StopSignal, FakeClock]) -> None:
    stop[0].started()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="130"):
        signal.raise_signal(signal.SIGINT)


def test_a_start_is_interrupted_once_by_a_signal_that_comes_twice(stop: tuple[running.StopSignal, FakeClock]) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # what ends the start is not interrupted


def test_signals_stay_the_commands_while_ray_is_started(
    stop: tuple[running.StopSignal, FakeClock], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []

    def popen(_command: str, **options: Any) -> None:
        started.append(options)

    services = SimpleNamespace(ConsolePopen=popen)

    def init(**_: Any) -> None:
        services.ConsolePopen("raylet", stdin=None)
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does

    ray = SimpleNamespace(
        init=init,
        is_initialized=lambda: False,
        available_resources=lambda: {"CPU": 100},
        _private=SimpleNamespace(services=services),
    )
    monkeypatch.setattr(runtime, "ray", ray)
    monkeypatch.setattr(runtime, "take_session", lambda: None)
    monkeypatch.setenv("RAY_worker_niceness", "0")
    runtime.RayRuntime(load_settings()).start()
    # what is sent to the whole group of the command is not for Ray, which ends after the pipeline
    assert started == [{"stdin": None, "process_group": 0}] and services.ConsolePopen is popen
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert stop[0].event.is_set()


# -- how a run ends


class Part:
    """A stage of a pipeline that is up."""

    handle = None
    restarts = 0
    stop_asked = False
    status: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def __init__(self, check: Callable[[], None] = lambda: None, stopped: Exception | None = None) -> None:
        self.check = check
        self.asked: list[str] = []
        self._stopped = stopped

    def call(self, method: str, *_: Any, **__: Any) -> None:
        self.asked.append(method)
        if self._stopped is not None:
            raise self._stopped

    def stop(self) -> None:
        self.call("stop")

    def stop_watching(self) -> None:
        """Nobody watches."""

    def kill(self) -> None:
        self.asked.append("kill")


class DeadBroker:
    """Starts, and has ended since; its disk is full."""

    pid = None
    log_file = Path("broker.log")
    bootstrap_servers = "127.0.0.1:1"

    def __init__(self, full: str) -> None:
        self.full_disk = lambda: full

    def start(self) -> None:
        """It starts, and ends at once."""

    def stop(self, _deadline_s: float = 0.0) -> None:
        """It has ended."""

    kill = stop


def given_up(broker: Any, on_event: Callable[[str], None]) -> BrokerSupervisor:
    supervisor = BrokerSupervisor(broker, on_event, FakeClock())
    supervisor.start()
    supervisor._thread.join(10)
    return supervisor


def started(monkeypatch: pytest.MonkeyPatch, start: Callable[[Pipeline], None]) -> None:
    monkeypatch.setattr(Pipeline, "_start", start)
    monkeypatch.setattr(faulthandler, "enable", lambda: None)


@pytest.mark.usefixtures("signals_left_alone")
@pytest.mark.parametrize(
    ("full", "cause"),
    [
        (
            "the disk of the broker's data is full (0 MiB free)",
            "the broker died: the disk of the broker's data is full",
        ),
        ("", "the broker died too often and is given up"),
    ],
)
def test_a_broker_that_is_given_up_is_what_the_run_ends_with_and_nobody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, full: str, cause: str
) -> None:
    spark = Part(stopped=ProcessingError("windows could not be published: timed out", "Check the broker"))

    def start(pipeline: Pipeline) -> None:
        pipeline._broker = given_up(DeadBroker(full), pipeline._tell)
        pipeline._processing = spark

    started(monkeypatch, start)
    done = call("run", "--state-dir", str(tmp_path))
    assert done.exit_code == StageFailedError.exit_code
    assert done.stderr.startswith(f"Error: {cause}") and "published" not in done.output
    assert cause in done.stdout  # at once, while the rest still ends
    assert spark.asked == ["kill"]


@pytest.mark.usefixtures("signals_left_alone")
def test_what_goes_wrong_while_a_run_that_failed_is_stopped_is_said_and_does_not_hide_the_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failed() -> None:
        raise StageFailedError("the API server failed: no memory")

    def start(pipeline: Pipeline) -> None:
        pipeline._serving = Part(failed)
        pipeline._processing = Part(stopped=ProcessingError("windows could not be published: timed out"))

    started(monkeypatch, start)
    done = call("run", "--state-dir", str(tmp_path))
    assert done.exit_code == StageFailedError.exit_code
    assert done.stderr == "Error: the API server failed: no memory\n"
    assert "while stopping: windows could not be published: timed out" in done.stdout


@pytest.mark.usefixtures("signals_left_alone")
def test_what_goes_wrong_after_a_start_that_failed_does_not_hide_the_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(pipeline: Pipeline) -> None:
        pipeline._ray = Part(stopped=ProcessingError("Ray does not end"))
        raise EnvironmentProblem("port 8000 cannot be used")

    started(monkeypatch, start)
    done = call("run", "--state-dir", str(tmp_path))
    assert (done.exit_code, done.stderr) == (EnvironmentProblem.exit_code, "Error: port 8000 cannot be used\n")
    assert "while stopping: Ray does not end" in done.stdout


@pytest.mark.usefixtures("signals_left_alone")
@pytest.mark.parametrize(("begun", "count"), [(False, 0), (True, None)])
def test_a_run_that_is_stopped_while_it_starts_writes_its_summary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun: bool, count: int | None
) -> None:
    def start(pipeline: Pipeline) -> None:
        pipeline._may_have_sent = begun
        raise KeyboardInterrupt

    started(monkeypatch, start)
    file = tmp_path / "summary.json"
    done = call("run", "--ratings", "50", "--state-dir", str(tmp_path), "--summary-json", str(file))
    assert done.exit_code == 0 and "stopped while starting" in done.stdout
    found = json.loads(file.read_text())
    assert list(found) == [field.name for field in fields(Summary)] and found["requested"] == 50
    assert {found[name] for name in ("delivered", "counted", "late_dropped", "rejected", "windows")} == {count}
    assert found["first_window_s"] is None and found["duration_s"] > 0


@pytest.mark.parametrize(
    ("running_stages", "stages", "refused"),
    [
        (("generate",), ("generate",), "a pipeline runs"),
        (("process",), ("process",), "a Spark job runs"),
        (("process",), ("generate", "process"), "a Spark job runs"),
        (("broker", "generate", "process"), ("process",), "a Spark job runs"),
        (("generate",), ("process",), None),
        (("process",), ("generate",), None),
    ],
)
def test_a_stage_that_runs_in_the_state_directory_is_not_started_twice(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    running_stages: tuple[str, ...],
    stages: tuple[str, ...],
    refused: str | None,
) -> None:
    class Allowed(RayPipelineError):
        """It came to the checks that follow."""

    def checks(*_: Any) -> None:
        raise Allowed("allowed")

    monkeypatch.setattr("ray_pipeline.doctor.require", checks)
    pipeline = Pipeline(load_settings(state_dir=tmp_path), stages=stages)
    with contextlib.ExitStack() as running:
        for stage in running_stages:
            running.enter_context(claimed_stage(tmp_path, stage, "it"))
        if refused is None:
            with pytest.raises(Allowed):
                pipeline.start()
        else:
            said = f"{refused} in the state directory .* already .process {os.getpid()}.* another --state-dir"
            with pytest.raises(EnvironmentProblem, match=said):
                pipeline.start()
    # and one that did not start has left nothing behind that is in the way of others
    with pytest.raises(Allowed):
        Pipeline(load_settings(state_dir=tmp_path), stages=stages).start()
    assert not list((tmp_path / "runs").iterdir())


# -- numbers that are none


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "1e300"])
@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("chaos", "--minutes"),
        ("grade --topic x --as late", "--lateness"),
        ("fit x.csv -o model.npz", "--held-out"),
        ("fit x.csv -o model.npz", "--regularisation"),
    ],
)
def test_a_number_without_an_end_is_refused_by_the_name_of_its_option(
    command: str, flag: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_PIPELINE_STATE_DIR", str(tmp_path))
    done = call(*command.split(), f"{flag}={number}")
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert flag in done.stderr, done.stderr


@pytest.mark.parametrize(("command", "flag"), [("chaos --start", "--rate"), ("jobs stop x", "--wait")])
def test_nor_is_one_taken_where_there_is_no_greatest(
    command: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_PIPELINE_STATE_DIR", str(tmp_path))
    done = call(*command.split(), flag, "inf")
    assert (done.exit_code, done.stderr) == (2, f"Error: {flag} inf is not a finite number. Give another\n")


# -- stages that follow alone


@pytest.mark.usefixtures("signals_left_alone")
@pytest.mark.parametrize(
    ("stage", "where"), [("serve", "serving.server.ServingStage"), ("verify", "verification.stage.VerificationStage")]
)
def test_a_stage_that_follows_alone_is_known_to_reset_and_is_no_pipeline_to_anybody(
    stage: str, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meanwhile: dict[str, Result] = {}

    class Following:
        def __init__(self, *_: object) -> None:
            """Nothing is started."""

        def start(self) -> None:
            for asked in (("reset", "--yes"), ("rate", "5"), ("batch",), ("chaos",), ("topics", "count", "ratings")):
                meanwhile[asked[0]] = call(*asked, "--state-dir", str(tmp_path))
            raise StageFailedError("enough is known")

    monkeypatch.setattr(f"ray_pipeline.{where}", Following)
    monkeypatch.setattr("ray_pipeline.doctor.require", lambda *_: None)
    monkeypatch.setattr("ray_pipeline.doctor.export_java_or_fail", lambda: "")
    monkeypatch.setattr(running, "check_broker", lambda *_, **__: None)
    monkeypatch.setattr(running, "partitions_of", lambda *_: {})
    monkeypatch.setattr(running, "ensure_topics", lambda *_: None)
    done = call(stage, "--bootstrap-servers", "127.0.0.1:1", "--state-dir", str(tmp_path))
    assert done.exit_code == StageFailedError.exit_code and "enough is known" in done.stderr
    assert meanwhile["reset"].exit_code == EnvironmentProblem.exit_code
    assert f"process {os.getpid()} ({stage})" in meanwhile["reset"].stderr
    for name in ("rate", "chaos"):
        assert "no pipeline runs" in meanwhile[name].stderr, name
    for name in ("batch", "topics"):
        assert "nothing has run in the state directory" in meanwhile[name].stderr, name
    assert call("reset", "--yes", "--state-dir", str(tmp_path)).exit_code == 0 and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("signals_left_alone")
def test_a_state_directory_that_cannot_be_written_keeps_no_stage_from_following(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(running, "_joining", lambda settings: settings)
    monkeypatch.setattr(running, "ensure_topics", lambda *_: None)

    class Following:
        def __init__(self, *_: object) -> None:
            raise StageFailedError("it came so far")

    monkeypatch.setattr("ray_pipeline.verification.stage.VerificationStage", Following)
    (tmp_path / "file").write_text("")
    done = call("verify", "--bootstrap-servers", "127.0.0.1:1", "--state-dir", str(tmp_path / "file"))
    assert "it came so far" in done.stderr
