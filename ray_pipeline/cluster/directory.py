"""Finds the pipelines on a Ray cluster, and asks them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util import list_named_actors

from ray_pipeline.cluster.runtime import NAMESPACE
from ray_pipeline.cluster.stages import PROCESSING_ACTOR
from ray_pipeline.errors import EnvironmentProblem, RayPipelineError, StageFailedError

__all__ = ["ask_job", "joined_cluster", "processing_jobs"]

_ANSWER_S = 30.0


@contextlib.contextmanager
def joined_cluster(address: str | None) -> Iterator[None]:
    """Join a Ray cluster for a while.

    Args:
        address: of the cluster; None = RAY_ADDRESS.

    Raises:
        EnvironmentProblem: there is none.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        raise EnvironmentProblem(
            problem="no Ray cluster is known: no pipeline runs in the state directory",
            fix="Name its --state-dir, or --ray-address",
        )
    try:
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise EnvironmentProblem(
            problem=f"the Ray cluster at {address} cannot be joined: {str(error).splitlines()[0]}",
            fix="Check that it runs; with token authentication set RAY_AUTH_MODE=token",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def processing_jobs() -> list[dict[str, Any]]:
    """The pipelines with a Spark job: name, brokers, control topic, and the job's record."""
    rows = []
    for name in _names():
        try:
            rows.append({"name": name, **ray.get(_actor(name).describe.remote(), timeout=_ANSWER_S)})
        except (RayError, GetTimeoutError, ValueError) as error:
            rows.append(
                {
                    "name": name,
                    "bootstrap_servers": "",
                    "control_topic": "",
                    "job": {"state": "no answer", "reason": type(error).__name__},
                }
            )
    return rows


def ask_job(name: str | None, method: str, *args: Any, timeout_s: float) -> Any:
    """Call a method of the actor that holds a pipeline's Spark application, such as ``run_batch``.

    Args:
        name: the pipeline's name; None = the only one there is.
        method: the method.
        args: its arguments.
        timeout_s: longest time, seconds.

    Raises:
        EnvironmentProblem: there is no such pipeline.
        StageFailedError: it does not answer.
        RayPipelineError: what the method raised.
    """
    names = _names()
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise EnvironmentProblem(
            problem=f"no running Spark job {name or ''} was found on this cluster", fix="See ray-pipeline jobs list"
        )
    try:
        return ray.get(getattr(_actor(name), method).remote(*args), timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, RayPipelineError):
            raise error.cause from error
        raise StageFailedError(problem=f"the Spark job failed: {error.cause}", fix="") from error
    except (RayError, GetTimeoutError) as error:
        raise StageFailedError(
            problem=f"the Spark job does not answer ({type(error).__name__})", fix="Try again"
        ) from error


def _names() -> list[str]:
    prefix = f"{PROCESSING_ACTOR}-"
    found = [str(actor["name"]) for actor in list_named_actors(all_namespaces=True)]
    return sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix))


def _actor(name: str) -> Any:
    return ray.get_actor(f"{PROCESSING_ACTOR}-{name}", namespace=NAMESPACE)
