"""The Ray cluster: joined, or started for the life of this process; and whether it is large enough."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray as _untyped_ray

from ray_pipeline.cluster.fleet import ACTOR_CPUS
from ray_pipeline.cluster.head import named_cluster, require_head
from ray_pipeline.cluster.session import leave_session, take_session
from ray_pipeline.config import Settings
from ray_pipeline.errors import EnvironmentProblem

ray: Any = _untyped_ray  # much of it has no types

__all__ = [
    "NAMESPACE",
    "SERVING_CPUS",
    "SPARK_DRIVER_CPUS",
    "VERIFY_CPUS",
    "CpuBudget",
    "RayRuntime",
    "cluster_usage",
    "cpu_budget",
    "join",
    "usable_cores",
]

NAMESPACE = "ray-pipeline"
SPARK_DRIVER_CPUS = 0.5
SERVING_CPUS = 0.25
VERIFY_CPUS = 0.25
_LOCAL_ACTORS = 8  # Ray starts an idle process for each CPU that it is given


@dataclass(frozen=True, slots=True)
class CpuBudget:
    """CPUs that Ray must set aside, by stage."""

    generator: float
    spark_driver: float
    executors: float
    serving: float
    verify: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.generator + self.spark_driver + self.executors + self.serving + self.verify

    def __str__(self) -> str:
        return (
            f"{self.total:g} CPUs (generator {self.generator:g}, Spark driver {self.spark_driver:g}, "
            f"executors {self.executors:g}, API {self.serving:g}, oracle {self.verify:g})"
        )


def usable_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_budget(settings: Settings, stages: tuple[str, ...] = ("generate", "process", "serve", "verify")) -> CpuBudget:
    """What the stages need."""
    process = "process" in stages
    return CpuBudget(
        generator=settings.actors * ACTOR_CPUS if "generate" in stages else 0.0,
        spark_driver=SPARK_DRIVER_CPUS if process else 0.0,
        executors=float(settings.executors * settings.executor_cores) if process else 0.0,
        serving=SERVING_CPUS if "serve" in stages else 0.0,
        verify=VERIFY_CPUS if "verify" in stages else 0.0,
    )


def join(address: str, logging_level: int) -> None:
    """Join a Ray cluster.

    Raises:
        EnvironmentProblem: it cannot be joined.
    """
    require_head(address)
    try:
        with _signals_kept():
            ray.init(address=address, namespace=NAMESPACE, logging_level=logging_level, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise EnvironmentProblem(
            problem=f"the Ray cluster at {address} cannot be joined: {str(error).splitlines()[0]}",
            fix="Check that it runs; with token authentication set RAY_AUTH_MODE=token",
        ) from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Signals stay this process's while Ray is started: it goes on to handle SIGTERM, which Ray would take.

    And Ray's processes are in groups of their own. SIGTERM to this process's group, as ``timeout`` sends it, would end Ray's dashboard
    agent at once and its raylet ten seconds later, and a pipeline that takes longer to end in order with it.
    """
    services = ray._private.services
    start, handler = services.ConsolePopen, signal.getsignal(signal.SIGTERM)
    services.ConsolePopen = functools.partial(start, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = start
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def cluster_usage() -> dict[str, Any]:
    """Nodes, CPUs and memory of the cluster, and what of it is free."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return {
        "nodes": sum(1 for node in ray.nodes() if node["Alive"]),
        "cpus": total.get("CPU", 0.0),
        "cpus_free": free.get("CPU", 0.0),
        "memory_bytes": int(total.get("memory", 0)),
        "memory_free_bytes": int(free.get("memory", 0)),
        "object_store_bytes": int(total.get("object_store_memory", 0)),
    }


class RayRuntime:
    """Joins the Ray cluster that the settings or RAY_ADDRESS name, or starts a local one.

    A local Ray gets as many CPUs as the stages need, however few cores there are: on a laptop they share. It also has room
    for some more generator actors, so that their number can be raised.

    Args:
        settings: all settings.
        stages: which stages will run.
    """

    def __init__(
        self, settings: Settings, stages: tuple[str, ...] = ("generate", "process", "serve", "verify")
    ) -> None:
        self._settings = settings
        self._budget = cpu_budget(settings, stages)
        self._address = named_cluster(settings.ray_address)
        self._session: Path | None = None
        self.local = self._address is None

    def start(self) -> None:
        """Join or start Ray.

        Raises:
            EnvironmentProblem: the cluster cannot be joined, or has too few CPUs.
        """
        if ray.is_initialized():
            self.local = False
        elif self._address is None:
            # Ray would have its workers step back behind all else, and so the Spark driver behind its own executors
            os.environ.setdefault("RAY_worker_niceness", "0")
            with _signals_kept():
                ray.init(
                    address="local",  # without it Ray would join whatever cluster was started on this machine last
                    num_cpus=max(usable_cores(), math.ceil(self._budget.total + self._room_to_scale())),
                    include_dashboard=False,
                    namespace=NAMESPACE,
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                )
            self._session = take_session()
        else:
            join(self._address, logging.WARNING)
        self.check_capacity()

    def _room_to_scale(self) -> float:
        actors = min(self._settings.partitions, _LOCAL_ACTORS)
        return max(0, actors - self._settings.actors) * ACTOR_CPUS if self._budget.generator else 0.0

    def check_capacity(self) -> None:
        """Refuse a cluster whose free CPUs do not suffice: Spark on Ray would wait for them for ever."""
        free = ray.available_resources().get("CPU", 0.0)
        if free + 1e-6 < self._budget.total:
            raise EnvironmentProblem(
                problem=f"the Ray cluster has {free:g} CPUs free, the pipeline needs {self._budget}",
                fix="Lower actors, executors or executor_cores, add nodes, or stop other jobs",
            )

    def stop(self) -> None:
        """Leave the cluster; a Ray that this object started ends with it, and leaves its logs."""
        ray.shutdown()
        if self._session is not None:
            leave_session(self._session)
