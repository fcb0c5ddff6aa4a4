"""What every actor of a pipeline knows and answers: whose it is, what it holds, and whether the pipeline shall end."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import ray as _untyped_ray

from ray_pipeline.state import still_runs

ray: Any = _untyped_ray  # much of it has no types

__all__ = ["Member", "Owner", "held_by_process", "held_together", "place_of"]

_PREFIX = "ray-pipeline"
_LOOK_AGAIN_S = 2.0  # finding the processes that a process has started reads the table of all


@dataclass(frozen=True, slots=True)
class Owner:
    """A pipeline, and the process that drives it.

    Attributes:
        name: the pipeline's name on its Ray cluster.
        stages: what it runs.
        bootstrap: its brokers, HOST:PORT[,…].
        node: Ray's id of the node that the process is on.
        pid: its process id.
        process_started: when it started, seconds since the epoch: tells it from another of the same id.
        has_ray: whether the Ray cluster is its own, and ends with the pipeline.
    """

    name: str
    stages: tuple[str, ...]
    bootstrap: str
    node: str
    pid: int
    process_started: float
    has_ray: bool

    @classmethod
    def of_this_process(cls, name: str, stages: tuple[str, ...], bootstrap: str, *, has_ray: bool) -> Owner:
        """For the calling process, which has started or joined the cluster."""
        node = str(ray.get_runtime_context().get_node_id())
        return cls(name, stages, bootstrap, node, os.getpid(), psutil.Process().create_time(), has_ray)

    @property
    def alive(self) -> bool:
        """Whether the process still runs; asked on its node."""
        return still_runs(self.pid, self.process_started)

    def actor_name(self, stage: str, *which: str) -> str:
        """What an actor of a stage is called on the cluster."""
        return "/".join((_PREFIX, self.name, stage, *which))


def place_of(actor_name: str) -> tuple[str, str] | None:
    """Pipeline and stage of an actor, from its name; None = it is none of a pipeline's."""
    parts = actor_name.split("/")
    return (parts[1], parts[2]) if parts[0] == _PREFIX and len(parts) >= 3 else None


class Member:
    """An actor of a pipeline.

    Args:
        owner: the pipeline, and who drives it.
    """

    starts_processes = False
    """Whether what its process has started counts as held by it."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._stop_asked = False
        self._held: dict[str, Any] = {}
        self._looked_s = 0.0

    def describe(self) -> dict[str, Any]:
        """Whose it is: the fields of :class:`Owner`."""
        return asdict(self._owner)

    def ask_to_stop(self) -> None:
        """Have the process that drives the pipeline end it in order, when it looks next."""
        self._stop_asked = True

    def standing(self) -> dict[str, Any]:
        """``stop_asked``, and ``held``: CPUs that Ray has set aside, memory and number of processes."""
        now_s = time.monotonic()
        if not self._held or now_s - self._looked_s > _LOOK_AGAIN_S:
            self._looked_s = now_s
            cpus = float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0))
            self._held = held_by_process(os.getpid(), cpus, children=self.starts_processes)
        return {"stop_asked": self._stop_asked, "held": self._held}


def held_by_process(pid: int, cpus: float = 0.0, *, children: bool = False) -> dict[str, Any]:
    """What a process holds now.

    Args:
        pid: process id.
        cpus: CPUs that Ray has set aside for it.
        children: whether to count the processes that it has started, and those that they have.

    Returns:
        ``cpus``, ``memory_bytes`` (resident now), ``processes``.
    """
    memory_bytes = processes = 0
    try:
        found = psutil.Process(pid)
        family = [found, *(found.children(recursive=True) if children else ())]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            memory_bytes += process.memory_info().rss
            processes += 1
        except psutil.NoSuchProcess:  # it ended between two looks
            continue
    return {"cpus": cpus, "memory_bytes": memory_bytes, "processes": processes}


def held_together(several: list[dict[str, Any]]) -> dict[str, Any]:
    """What several hold, as :func:`held_by_process` says it of one; memory is None where one of them has not said its own."""
    memory = [one["memory_bytes"] for one in several]
    return {
        "cpus": sum(one["cpus"] for one in several),
        "memory_bytes": None if None in memory else sum(memory),
        "processes": sum(one["processes"] for one in several),
    }
