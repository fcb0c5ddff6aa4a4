"""Real parts for the tests: a broker, and a pipeline as a user starts it. Each starts once a session, and ends with it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from tests.secured import SecuredBroker

_BIN = Path(sys.executable).parent

# dozens of JVMs are started here and none lives long: time spent on making them fast does not come back
os.environ.setdefault(
    "JDK_JAVA_OPTIONS",
    "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:-UsePerfData "
    "-XX:+UnlockDiagnosticVMOptions -XX:-BytecodeVerificationRemote",
)


def has_ended(process: psutil.Process) -> bool:
    """Also one that nobody has taken note of yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(what: str, reached: Callable[[], Any], deadline_s: float = 60.0) -> Any:
    """Poll until something true comes back, and return it."""
    end = time.monotonic() + deadline_s
    while True:
        found = reached()
        if found:
            return found
        assert time.monotonic() < end, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(0.1)


def clean_environment() -> dict[str, str]:
    """The environment without settings of this package or of Ray, but two: to be as fresh as by default would take a core more."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAY_PIPELINE_"))}
    return {**kept, "RAY_PIPELINE_TRIGGER_INTERVAL_MS": "1000", "RAY_PIPELINE_COMMIT_INTERVAL_MS": "500"}


def command(*arguments: str | Path, timeout_s: float = 120.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``ray-pipeline`` as a user does."""
    return _finished(_BIN / "ray-pipeline", *arguments, timeout_s=timeout_s, **environment)


def python(*arguments: str | Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a Python program that uses the package, and have it end well."""
    done = _finished(sys.executable, *arguments, timeout_s=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _finished(*arguments: str | Path, timeout_s: float, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**clean_environment(), **environment},
        check=False,
    )


@dataclasses.dataclass
class Running:
    """A ``ray-pipeline`` process."""

    process: subprocess.Popen[str]
    state_dir: Path
    output: Path

    @classmethod
    def start(cls, state_dir: Path, *arguments: str) -> Running:
        state_dir.mkdir(parents=True, exist_ok=True)
        output = state_dir / f"{arguments[0]}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                [_BIN / "ray-pipeline", *arguments, "--state-dir", str(state_dir)],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env=clean_environment(),
                process_group=0,
            )
        return cls(process, state_dir, output)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def info(self, deadline_s: float = 150.0) -> dict[str, Any]:
        """What the process wrote down of itself when it was up."""
        file = self.state_dir / "runs" / f"{self.process.pid}.json"

        def up() -> bool:
            assert self.process.poll() is None, self.text
            return file.is_file()

        wait_for("the start", up, deadline_s)
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def end(self, number: int = signal.SIGINT, deadline_s: float = 120.0) -> int:
        """Send a signal and wait for the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(deadline_s)

    def end_by_timeout(self, deadline_s: float = 120.0) -> int:
        """As ``timeout 60 make run`` ends it: SIGTERM to all of its group, which ``make`` passes on to it once more."""
        os.killpg(self.process.pid, signal.SIGTERM)
        return self.end(signal.SIGTERM, deadline_s)

    def kill(self) -> None:
        """End it whatever it does; what it started ends with it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Kafka broker; its HOST:PORT."""
    from ray_pipeline.kafka.broker import EmbeddedBroker

    embedded = EmbeddedBroker(tmp_path_factory.mktemp("broker"))
    embedded.start()
    yield embedded.bootstrap_servers
    embedded.stop()


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    """A real Kafka broker that speaks TLS."""
    from tests.secured import SecuredBroker

    broker = SecuredBroker(tmp_path_factory.mktemp("secured"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Starts ``ray-pipeline`` processes, which end with the session at the latest."""
    started: list[Running] = []

    def start(*arguments: str, state_dir: Path | None = None) -> Running:
        running = Running.start(state_dir or tmp_path_factory.mktemp("state"), *arguments)
        started.append(running)
        return running

    yield start
    for running in started:
        running.kill()


@pytest.fixture(scope="session")
def pipeline(starter: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A whole pipeline, as ``ray-pipeline run`` starts it, with an archive, and with windows short enough to see some close."""
    state_dir = tmp_path_factory.mktemp("state")
    archive = ("--archive", (state_dir / "archive").as_uri(), "--archive-interval", "5")
    yield starter("run", *PIPELINE_FLAGS, *archive, state_dir=state_dir)


PIPELINE_FLAGS: Sequence[str] = (
    "--rate",
    "200",
    "--api-port",
    "0",
    "--ui-port",
    "0",
    "--tumbling",
    "10",
    "--sliding",
    "30",
    "--slide",
    "10",
    "--watermark",
    "20",
)


_WHOLE_PIPELINES = {"test_pipeline", "test_dashboard", "test_bounded", "test_chaos"}
"""Files whose tests have whole pipelines to themselves."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cheap ones first; then all that use the one pipeline, in the order they are written, so that it does not run for long."""

    def place(item: pytest.Item) -> int:
        if "/unit/" in str(item.path):
            return 0
        if "/contract/" in str(item.path):
            return 1
        return 2 if not {"pipeline", "urls"}.isdisjoint(getattr(item, "fixturenames", ())) else 3

    items.sort(key=place)


class _Lanes(LoadScopeScheduling):  # type: ignore[no-any-unimported]
    """Whole pipelines go to one process, one after another: two at once are more than two cores carry. What needs little goes to the
    other; then whoever is free takes the next file."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.split("::")[0])
        if file.stem in _WHOLE_PIPELINES:
            return "whole pipelines"
        return file.stem if "integration" in file.parts else "little"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:  # type: ignore[no-any-unimported]
    """How tests are shared out among the two processes of ``make test``."""
    return _Lanes(config, log)
