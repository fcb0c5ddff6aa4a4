"""Which process does what, among the descendants of a run: no process is ever taken for one by its name alone."""

from __future__ import annotations

import contextlib
import enum
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from ray_pipeline.errors import EnvironmentProblem
from ray_pipeline.state import still_runs

__all__ = ["ProcessRow", "ProcessTree", "Role", "roles"]

_JAVA_WORKER = "io.ray.runtime.runner.worker.DefaultWorker"
_OF_EXECUTORS = "-Dspark.driver.port="


class Role(enum.StrEnum):
    """What a process does."""

    RUN = "run"
    BROKER = "broker"
    GENERATOR = "generator"
    DRIVER = "Spark driver"
    DRIVER_JVM = "Spark driver JVM"
    MASTER = "RayDP master"
    EXECUTOR = "Spark executor"
    SERVING = "API and dashboard"
    VERIFYING = "verification"
    RAY = "Ray"


_ACTORS = {"_ServingActor": Role.SERVING, "_VerificationActor": Role.VERIFYING}
"""Ray names a worker's process after its actor."""


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """A process of the run.

    Attributes:
        pid: its id.
        parent: its parent's id.
        created: when it started, seconds since the epoch: tells it from a later one of the same id.
        name: of its executable.
        command: its command line.
        memory_bytes: resident memory.
    """

    pid: int
    parent: int
    created: float
    name: str
    command: tuple[str, ...]
    memory_bytes: int = 0

    @property
    def title(self) -> str:
        """What to call it, such as ``kafka.Kafka 4711``."""
        if self.name != "java":
            return f"{self.command[0].rpartition('/')[2] if self.command else self.name} {self.pid}"
        main = next(
            (part for part in self.command if part.rpartition(".")[2][:1].isupper() and "=" not in part), "java"
        )
        return f"{main.rpartition('.')[2]} {self.pid}"


def roles(
    rows: Iterable[ProcessRow], run_pid: int, generator: Mapping[str, Any], job: Mapping[str, Any]
) -> dict[Role, list[ProcessRow]]:
    """Sort the processes of a run by what they do.

    Args:
        rows: the run's process and its descendants.
        run_pid: the run's process.
        generator: record ``generator``: has the ids of the actors.
        job: record ``job``: has the id of the process with the Spark driver.

    Returns:
        The processes of each role, oldest first; roles without a process are left out.
    """
    actors = {actor.get("pid") for actor in generator.get("actors", ())}
    driver = job.get("pid")
    found: dict[Role, list[ProcessRow]] = {}
    for row in sorted(rows, key=lambda row: (row.created, row.pid)):
        found.setdefault(_role(row, run_pid, actors, driver), []).append(row)
    return found


def _role(row: ProcessRow, run_pid: int, actors: set[Any], driver: Any) -> Role:
    if row.pid == run_pid:
        return Role.RUN
    if row.pid in actors:
        return Role.GENERATOR
    if row.pid == driver:
        return Role.DRIVER
    if row.name == "java":
        return _java_role(row, driver)
    command = " ".join(row.command)
    return next((role for name, role in _ACTORS.items() if name in command), Role.RAY)


def _java_role(row: ProcessRow, driver: Any) -> Role:
    if "kafka.Kafka" in row.command:
        return Role.BROKER
    if _JAVA_WORKER in row.command:
        # executors are told where the driver is; the master hands them out
        executor = any(argument.startswith(_OF_EXECUTORS) for argument in row.command)
        return Role.EXECUTOR if executor else Role.MASTER
    return Role.DRIVER_JVM if row.parent == driver else Role.MASTER


class ProcessTree:
    """A run's process and what it started.

    Args:
        pid: the run's process.
        created: when it started, seconds since the epoch.
    """

    def __init__(self, pid: int, created: float) -> None:
        self.pid = pid
        self._created = created

    def move_to(self, pid: int, created: float) -> None:
        """Watch another run, which goes on where this one was."""
        self.pid, self._created = pid, created

    def rows(self) -> list[ProcessRow]:
        """The processes that run now.

        Raises:
            EnvironmentProblem: the run has ended.
        """
        try:
            root = psutil.Process(self.pid)
            if abs(root.create_time() - self._created) >= 1.0:
                raise psutil.NoSuchProcess(self.pid)
            processes = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise EnvironmentProblem(
                problem=f"the pipeline of process {self.pid} has ended", fix="See its output and logs"
            ) from None
        return [row for row in map(_row, processes) if row is not None]

    def signal(self, row: ProcessRow, number: int) -> None:
        """Send a signal to one of them; quick, for who aims at a moment.

        Raises:
            LookupError: it is none of the run's processes any more.
        """
        try:
            process = psutil.Process(row.pid)
            above = {(parent.pid, parent.create_time()) for parent in process.parents()}
            if process.create_time() != row.created or not any(
                pid == self.pid and abs(created - self._created) < 1.0 for pid, created in above
            ):
                msg = f"process {row.pid} is no descendant of the run"
                raise LookupError(msg)
            process.send_signal(number)
        except psutil.NoSuchProcess:
            msg = f"process {row.pid} has ended"
            raise LookupError(msg) from None

    @staticmethod
    def still_there(rows: Iterable[ProcessRow]) -> list[ProcessRow]:
        """Those that have not ended."""
        return [row for row in rows if still_runs(row.pid, row.created)]

    @staticmethod
    def let_go_on(row: ProcessRow) -> None:
        """Have a process that was stopped go on, if it is still there, whatever became of the run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(row.pid)
            if process.create_time() == row.created:
                process.send_signal(signal.SIGCONT)


def _row(process: psutil.Process) -> ProcessRow | None:
    """A process that is there and no zombie."""
    try:
        with process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            return ProcessRow(
                process.pid,
                process.ppid(),
                process.create_time(),
                process.name(),
                tuple(process.cmdline()),
                process.memory_info().rss,
            )
    except psutil.NoSuchProcess:
        return None
