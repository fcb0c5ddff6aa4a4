"""The Spark application that a command has its job run in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Protocol

from ray_pipeline import doctor
from ray_pipeline.cluster.head import named_cluster
from ray_pipeline.cluster.token import present_token
from ray_pipeline.config import Settings
from ray_pipeline.state import active_run, active_runs, broker_for_reading

__all__ = ["Ask", "ray_address", "runs", "spark_job"]


class Ask(Protocol):
    """Calls a method of the stage that holds the Spark application."""

    def __call__(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call it and wait, at most so many seconds."""


@contextlib.contextmanager
def spark_job(settings: Settings) -> Iterator[Ask]:
    """The Spark application of the pipeline that runs; a Spark of this process' own where none runs.

    Raises:
        EnvironmentProblem: the pipeline's cluster cannot be joined, or Java is missing.
        ConfigurationError: nothing has run in this state directory.
    """
    present_token()
    if runs(settings):
        from ray_pipeline.cluster.directory import ask_job, joined_cluster

        run = active_run(settings.state_dir, "process")
        with joined_cluster(ray_address(settings)):
            yield functools.partial(ask_job, run.name if run is not None else None)
        return
    from ray_pipeline.windows.stage import WindowStage

    doctor.export_java_or_fail()
    with broker_for_reading(settings) as bootstrap:
        stage = WindowStage(settings, bootstrap, master="local[*]")
        stage.start_session()
        try:
            yield lambda method, *args, timeout_s: getattr(stage, method)(*args)
        finally:
            stage.stop()


def runs(settings: Settings) -> bool:
    """Whether a pipeline runs whose Spark application is known."""
    job = active_run(settings.state_dir, "process")
    return ray_address(settings) is not None and (job is not None or active_run(settings.state_dir) is None)


def ray_address(settings: Settings) -> str | None:
    """The Ray cluster of the settings, else that of what runs in the state directory, a Spark job first; None = none is known."""
    if settings.ray_address and (named := named_cluster(settings.ray_address)):
        return named
    here = (active_run(settings.state_dir, "process"), *active_runs(settings.state_dir))
    return next((run.ray_address for run in here if run is not None and run.ray_address), None)
