"""A short storm: every kind of fault once, on a pipeline of its own, and not a record or window is wrong afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.chaos.plan import KINDS, Kind
from ray_pipeline.state import RunInfo, remember_run
from tests.conftest import command

_LEFT_OUT = {Kind.STOP_BROKER, Kind.KILL_DRIVER}
"""Those that other tests have, to stay below five minutes."""


@pytest.mark.timeout(900)
def test_a_storm_leaves_no_gap_no_repeat_and_no_wrong_window(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind not in _LEFT_OUT]
    report = tmp_path / "report.json"
    arguments = ("--start", "--seed", "5", "--each", "1", "--minutes", "10", "--faults", ",".join(kinds))
    done = command("chaos", *arguments, "--state-dir", tmp_path, "--report", report, timeout_s=840)
    said = done.stdout + done.stderr
    assert report.is_file(), said
    found = json.loads(report.read_text())
    assert [o for o in found["outcomes"] if o["skipped"] or o["failed"]] == [], said
    assert {o["kind"] for o in found["outcomes"]} == set(kinds) and found["faults"]["injected"] == len(kinds)
    assert found["records_checked"] > 5_000 and found["audit"]["windows"]["checked"] > 10
    assert (found["gaps"], found["repeats"], found["wrong_windows"], found["audit"]["findings"]) == (0, 0, 0, []), said
    assert found["restarts"]["Spark, by its watchdog"] == 1, said
    assert (found["verdict"], done.returncode) == ("survived", 0), said
    assert not list(tmp_path.glob("chaos-*")), "what the pipeline left was to be removed"


def test_a_storm_is_refused_where_it_would_not_be_at_home(tmp_path: Path) -> None:
    nobody = command("chaos", "--minutes", "1", "--state-dir", tmp_path)
    assert nobody.returncode == 2 and "--start" in nobody.stderr
    remember_run(tmp_path, RunInfo.of_this_process("192.0.2.7:9092", stages=("generate",)))
    away = command("chaos", "--minutes", "1", "--state-dir", tmp_path)
    assert away.returncode == 2 and "192.0.2.7:9092" in away.stderr and "loopback" in away.stderr
    unknown = command("chaos", "--faults", "kill-nobody", "--state-dir", tmp_path)
    assert unknown.returncode == 2 and "kill-nobody" in unknown.stderr and "kill-broker" in unknown.stderr
