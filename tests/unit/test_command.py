"""The command line: what its help says, which settings a stage alone takes from the topic, and what is refused before any work."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from ray_pipeline.__main__ import app
from ray_pipeline.command import running
from ray_pipeline.config import Settings, flag_of, load_settings
from ray_pipeline.knobs import knob_of
from ray_pipeline.pipeline import Pipeline

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
    assert "[default: one a core]" in call("audit", "--help").stdout
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
