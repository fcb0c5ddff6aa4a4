"""The windowing and the serving stage as actors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray as _untyped_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_pipeline.cluster.files import SharedFiles
from ray_pipeline.cluster.membership import Member, Owner
from ray_pipeline.cluster.runtime import SERVING_CPUS, SPARK_DRIVER_CPUS, VERIFY_CPUS
from ray_pipeline.cluster.session import java_folder, session_folder
from ray_pipeline.config import Settings
from ray_pipeline.history.parquet import ParquetOrder
from ray_pipeline.ports import any_free_port

ray: Any = _untyped_ray  # its types know fewer options than it does

__all__ = ["build_processing_actor", "build_serving_actor", "build_verification_actor"]


class _ProcessingActor(Member):
    """Holds the Spark driver in a process of its own."""

    starts_processes = True  # the driver's JVM

    def __init__(self, settings: Settings, owner: Owner, files: SharedFiles) -> None:
        from ray_pipeline.windows.stage import WindowStage

        super().__init__(owner)
        # on a cluster of somebody else's each node has a folder of its own, and may not have this one
        temporary = java_folder(session_folder()) if owner.has_ray else None
        self._stage = WindowStage(files.at_hand(settings), owner.bootstrap, temporary=temporary)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "job": self._stage.status()}

    def start(self) -> None:
        self._stage.start()

    def status(self) -> dict[str, Any]:
        return {**self._stage.status(), **self.standing(), "pid": os.getpid()}

    def drain(self, deadline_s: float) -> bool:
        return self._stage.drain(deadline_s)

    def stop(self) -> None:
        self._stage.stop()

    def run_batch(
        self, archive: str | None = None, asked: Mapping[str, Any] | None = None, catalogue: str | None = None
    ) -> dict[str, Any]:
        return self._stage.run_batch(archive, asked, catalogue)

    def start_history(self, order: ParquetOrder | int) -> None:
        self._stage.start_history(order)

    def history_status(self) -> dict[str, Any]:
        return self._stage.history_status()

    def cancel_history(self) -> None:
        self._stage.cancel_history()


class _ServingActor(Member):
    """Holds the store, the HTTP API and the dashboard."""

    def __init__(self, settings: Settings, owner: Owner, files: SharedFiles) -> None:
        from ray_pipeline.serving.server import ServingStage

        super().__init__(owner)
        self._stage = ServingStage(files.at_hand(settings), owner.bootstrap)

    def start(self) -> None:
        self._stage.start()

    def status(self) -> dict[str, Any]:
        return {**self._stage.status(), **self.standing(), "urls": self._stage.urls(), "pid": os.getpid()}

    def snapshot(self) -> dict[str, Any]:
        return self._stage.summary()

    def stop(self, deadline_s: float) -> None:
        self._stage.stop(deadline_s)


class _VerificationActor(Member):
    """Holds what checks the pipeline."""

    def __init__(self, settings: Settings, owner: Owner, files: SharedFiles) -> None:
        from ray_pipeline.verification.stage import VerificationStage

        super().__init__(owner)
        self._stage = VerificationStage(files.at_hand(settings), owner.bootstrap)

    def start(self) -> None:
        self._stage.start()

    def status(self) -> dict[str, Any]:
        return {**self._stage.status(), **self.standing(), "pid": os.getpid()}

    def stop(self, deadline_s: float) -> None:
        self._stage.stop(deadline_s)


def build_processing_actor(settings: Settings, owner: Owner, files: SharedFiles) -> Any:
    """Make the actor that holds the Spark driver; its ``start`` brings Spark up on this Ray cluster."""
    return (
        ray.remote(num_cpus=SPARK_DRIVER_CPUS, max_restarts=-1, max_task_retries=0, max_concurrency=4)(_ProcessingActor)
        .options(name=owner.actor_name("process"))
        .remote(settings, owner, files)
    )


def build_serving_actor(settings: Settings, owner: Owner, files: SharedFiles) -> Any:
    """Make the actor that serves API and dashboard, on this node: its ports are the ones the user asked for here.

    Any free port is chosen now, so that the API is where it was when its process has been replaced.
    """
    settings = _with_ports(settings)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return (
        ray.remote(num_cpus=SERVING_CPUS, max_restarts=-1, max_task_retries=0, max_concurrency=4)(_ServingActor)
        .options(name=owner.actor_name("serve"), scheduling_strategy=here)
        .remote(settings, owner, files)
    )


def build_verification_actor(settings: Settings, owner: Owner, files: SharedFiles) -> Any:
    """Make the actor that checks the pipeline; on this node where there is room, so as not to split a node that Spark needs."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return (
        ray.remote(num_cpus=VERIFY_CPUS, max_restarts=-1, max_task_retries=0, max_concurrency=4)(_VerificationActor)
        .options(name=owner.actor_name("verify"), scheduling_strategy=here)
        .remote(settings, owner, files)
    )


def _with_ports(settings: Settings) -> Settings:
    """The settings, with a free port wherever any will do."""
    chosen: dict[str, int] = {}
    for name in ("api", "ui"):
        if getattr(settings, f"{name}_port") == 0:
            chosen[f"{name}_port"] = any_free_port(getattr(settings, f"{name}_host"), besides=chosen.values())
    return settings.model_copy(update=chosen)
