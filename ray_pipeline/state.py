"""What a state directory knows of the processes that run, or ran, in it: one file each, ``runs/<process id>.json``."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ray_pipeline.brokers import Brokers
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError, EnvironmentProblem
from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.client import check_broker

__all__ = [
    "RunInfo",
    "active_run",
    "active_runs",
    "broker_for_reading",
    "broker_kept_out",
    "brokers_of",
    "claimed_stage",
    "forget_run",
    "remember_run",
    "require_writable",
    "still_runs",
]

_FOLDER = "runs"


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A process that uses a state directory.

    Attributes:
        pid: its process id.
        process_started: when the process started, seconds since the epoch: tells it from another of the same id.
        bootstrap: brokers, HOST:PORT[,…].
        stages: what runs: ``broker``, ``generate``, ``process``, ``serve``.
        name: name of the pipeline on its Ray cluster; empty without one.
        ray_address: that cluster's address; empty without one.
        token: control token.
        urls: ``api`` and ``ui``.
    """

    pid: int
    process_started: float
    bootstrap: str
    stages: tuple[str, ...] = ()
    name: str = ""
    ray_address: str = ""
    token: str = ""
    urls: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_this_process(cls, bootstrap: str, **more: Any) -> RunInfo:
        """For the calling process."""
        return cls(os.getpid(), psutil.Process().create_time(), bootstrap, **more)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return still_runs(self.pid, self.process_started)


def still_runs(pid: int, process_started: float) -> bool:
    """Whether a process of this machine still runs; one that has ended and was not waited for does not.

    Args:
        pid: its process id.
        process_started: when it started, seconds since the epoch: tells it from another of the same id.
    """
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - process_started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def require_writable(state_dir: Path) -> None:
    """Make the state directory.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    probe = state_dir / f".probe-{os.getpid()}"
    try:
        (state_dir / "logs").mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise EnvironmentProblem(
            problem=f"the state directory {state_dir} cannot be written ({error.strerror})",
            fix="Name another with --state-dir",
        ) from None


def remember_run(state_dir: Path, run: RunInfo) -> None:
    """Write down who runs; readable by this user alone, because of the token. Those who have died are forgotten."""
    folder = state_dir / _FOLDER
    folder.mkdir(exist_ok=True)
    for file in folder.glob("*.json"):
        other = _read(file)
        if other is None or not other.alive:
            file.unlink(missing_ok=True)
    fresh = folder / f"{run.pid}.new"
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps(asdict(run)))
    fresh.replace(folder / f"{run.pid}.json")


def forget_run(state_dir: Path) -> None:
    """What this process ran has ended."""
    (state_dir / _FOLDER / f"{os.getpid()}.json").unlink(missing_ok=True)


def active_runs(state_dir: Path) -> list[RunInfo]:
    """Whoever runs in this state directory: first who has the broker, then who has most stages, then the oldest."""
    runs = [run for run in map(_read, (state_dir / _FOLDER).glob("*.json")) if run is not None and run.alive]
    return sorted(runs, key=lambda run: ("broker" not in run.stages, -len(run.stages), run.process_started))


def active_run(state_dir: Path, stage: str | None = None) -> RunInfo | None:
    """The first of :func:`active_runs`, of those with a certain stage if one is named; None when there is none."""
    return next((run for run in active_runs(state_dir) if stage is None or stage in run.stages), None)


def brokers_of(run: RunInfo, settings: Settings) -> Brokers:
    """The brokers of a run in the state directory, spoken to as the settings say; those are not written down there.

    Raises:
        ConfigurationError: a file of a certificate or a key cannot be used.
    """
    return Brokers(run.bootstrap) if "broker" in run.stages else settings.secured(run.bootstrap)


@contextlib.contextmanager
def claimed_stage(state_dir: Path, stage: str, what: str) -> Iterator[None]:
    """Nobody else runs a stage in this state directory meanwhile, also not one that is just being started.

    Args:
        state_dir: the state directory; it exists.
        stage: the stage.
        what: what it is called when somebody else has it, such as ``a pipeline``.

    Raises:
        EnvironmentProblem: somebody else does.
    """
    (state_dir / _FOLDER).mkdir(exist_ok=True)
    file = state_dir / _FOLDER / f"{stage}.lock"
    while True:
        with file.open("a+") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.seek(0)
                raise EnvironmentProblem(
                    problem=f"{what} runs in the state directory {state_dir} already (process {held.read() or 'unknown'})",
                    fix="Stop it, or name another --state-dir",
                ) from None
            if not _is_at(file, held.fileno()):
                continue  # whoever had it has just removed it
            held.truncate(0)
            held.write(str(os.getpid()))
            held.flush()
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def broker_kept_out(state_dir: Path) -> Iterator[None]:
    """No embedded broker runs, or is started, in this state directory meanwhile.

    Raises:
        EnvironmentProblem: one runs.
    """
    lock = state_dir / "broker" / "lock"
    if not lock.is_file():
        yield
        return
    with lock.open() as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EnvironmentProblem(
                problem=f"the broker of {state_dir} is in use by process {(held.read().split() or ['unknown'])[0]}",
                fix="Stop it first",
            ) from None
        yield


@contextlib.contextmanager
def broker_for_reading(settings: Settings) -> Iterator[str]:
    """Brokers to read from: those of the settings, of the run that goes on, else the embedded one, started for so long.

    Raises:
        BrokerUnavailableError: the broker that was named does not answer.
        ConfigurationError: nothing has run in this state directory.
    """
    if brokers := settings.brokers:
        check_broker(brokers)
        yield brokers
        return
    run = active_run(settings.state_dir)
    if run is not None:
        brokers = brokers_of(run, settings)
        check_broker(brokers, starting=True)
        yield brokers
        return
    if not (settings.state_dir / "broker" / "data").is_dir():
        raise ConfigurationError(
            problem=f"nothing has run in the state directory {settings.state_dir} yet",
            fix="Start ray-pipeline run, or name brokers with --bootstrap-servers",
        )
    broker = EmbeddedBroker(settings.state_dir, settings.broker_port)
    broker.start()
    try:
        yield broker.bootstrap_servers
    finally:
        broker.stop()


def _read(file: Path) -> RunInfo | None:
    try:
        fields = json.loads(file.read_text())
        return RunInfo(**{**fields, "stages": tuple(fields["stages"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
