"""One state directory, several processes: none forgets another, and ``reset`` takes nothing from under one that lives."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from ray_pipeline.__main__ import app
from ray_pipeline.clock import FakeClock
from ray_pipeline.command import asking
from ray_pipeline.command.sparkjob import ray_address, runs
from ray_pipeline.config import load_settings
from ray_pipeline.errors import EnvironmentProblem
from ray_pipeline.state import RunInfo, active_run, active_runs, claimed_stage, forget_run, remember_run


def of_another_process(*stages: str, **more: Any) -> RunInfo:
    parent = psutil.Process(os.getppid())
    return RunInfo(parent.pid, parent.create_time(), "127.0.0.1:9092", stages, **more)


def reset(state_dir: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["reset", "--yes", "--state-dir", str(state_dir), *flags])


def test_a_broker_is_known_after_a_generator_beside_it_has_ended(tmp_path: Path) -> None:
    broker = of_another_process("broker")
    remember_run(tmp_path, broker)
    remember_run(tmp_path, RunInfo.of_this_process("127.0.0.1:9092", stages=("generate", "process")))
    assert active_run(tmp_path) == broker and len(active_runs(tmp_path)) == 2
    found = active_run(tmp_path, "generate")
    assert found is not None and found.pid == os.getpid()
    forget_run(tmp_path)
    assert active_runs(tmp_path) == [broker] and active_run(tmp_path, "generate") is None


def test_who_has_ended_and_was_not_waited_for_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember_run(tmp_path, of_another_process("generate"))
    assert active_run(tmp_path) is not None
    monkeypatch.setattr(psutil.Process, "status", lambda _: psutil.STATUS_ZOMBIE)
    assert active_run(tmp_path) is None


def test_who_has_died_is_forgotten_and_tokens_are_for_this_user_alone(tmp_path: Path) -> None:
    remember_run(
        tmp_path, RunInfo(os.getppid(), 12345.0, "127.0.0.1:9092", ("generate",))
    )  # its number went to another
    assert active_run(tmp_path) is None
    remember_run(tmp_path, RunInfo.of_this_process("127.0.0.1:9092", token="secret"))
    (file,) = (tmp_path / "runs").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_of_two_that_start_a_stage_at_once_one_is_refused(tmp_path: Path) -> None:
    with claimed_stage(tmp_path, "generate", "a pipeline"):
        with pytest.raises(EnvironmentProblem, match=f"a pipeline runs in .*already .process {os.getpid()}."):
            claimed_stage(tmp_path, "generate", "a pipeline").__enter__()
        with claimed_stage(tmp_path, "process", "a Spark job"):  # another terminal
            pass
    left = tmp_path / "runs" / "generate.lock"
    assert not left.exists()
    left.write_text("1")  # by one that was killed
    with claimed_stage(tmp_path, "generate", "a pipeline"):
        assert left.read_text() == str(os.getpid())


def test_a_claim_that_is_let_go_while_another_waits_for_its_file_is_not_taken_for_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real = tmp_path / "runs" / "generate.lock", fcntl.flock
    file.parent.mkdir()
    file.write_text("1")

    def removed_meanwhile(held: Any, how: int) -> None:
        monkeypatch.undo()
        file.unlink()
        real(held, how)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with claimed_stage(tmp_path, "generate", "a pipeline"):
        assert file.read_text() == str(os.getpid()), "what is locked is what others find"


def test_a_batch_job_finds_the_spark_job_beside_a_broker(tmp_path: Path) -> None:
    settings = load_settings(state_dir=tmp_path)
    remember_run(tmp_path, of_another_process("broker"))
    assert not runs(settings)
    remember_run(tmp_path, RunInfo.of_this_process("127.0.0.1:9092", stages=("process",), ray_address="10.0.0.1:6379"))
    assert runs(settings) and ray_address(settings) == "10.0.0.1:6379"


def test_reset_leaves_what_a_living_process_uses(tmp_path: Path) -> None:
    (tmp_path / "broker" / "data").mkdir(parents=True)
    remember_run(tmp_path, of_another_process("process"))
    done = reset(tmp_path)
    assert done.exit_code == 3 and str(os.getppid()) in done.stderr
    (tmp_path / "runs" / f"{os.getppid()}.json").unlink()
    # one that is starting, or reads after a run has ended, is not written down: it holds the broker's lock
    with (tmp_path / "broker" / "lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = reset(tmp_path)
        assert done.exit_code == 3 and "process 4711" in done.stderr
    assert (tmp_path / "broker" / "data").is_dir()
    assert reset(tmp_path).exit_code == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("key", "named"), [("generator", "run abc"), ("job", "Spark job app-1")])
def test_reset_leaves_topics_that_are_used_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, named: str
) -> None:
    clock, said = FakeClock(), {"run": "abc", "application": "app-1", "state": "running", "updated_ms": 1}
    deleted: list[str] = []
    monkeypatch.setattr(asking, "check_broker", lambda *_: None)
    monkeypatch.setattr(asking, "partitions_of", lambda *_: {"ratings.progress": 1, "metrics.progress": 1})
    monkeypatch.setattr(asking, "delete_topics", lambda _, bootstrap: deleted.append(bootstrap))
    monkeypatch.setattr(asking, "SystemClock", lambda: clock)
    monkeypatch.setattr(asking, "_newest", lambda *asked: dict(said) if asked[-1] == key else {})
    (tmp_path / "checkpoint").mkdir()
    began_ms = clock.now_ms()
    wait = clock.wait

    def reports_after_five_seconds(*waited: Any) -> bool:
        said["updated_ms"] = 2 if clock.now_ms() - began_ms > 5_000 else 1
        return wait(*waited)

    monkeypatch.setattr(clock, "wait", reports_after_five_seconds)
    done = reset(tmp_path, "--bootstrap-servers", "kafka:9092")
    assert done.exit_code == 3 and named in done.stderr
    assert not deleted and (tmp_path / "checkpoint").is_dir()
    # it was killed: nobody reports any more
    monkeypatch.setattr(clock, "wait", wait)
    assert reset(tmp_path, "--bootstrap-servers", "kafka:9092").exit_code == 0
    # the checkpoint has read those topics: it goes with them
    assert deleted == ["kafka:9092"] and not (tmp_path / "checkpoint").exists()
