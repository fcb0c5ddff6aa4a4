"""Finds the pipelines on a Ray cluster, and asks them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util import list_named_actors

from ray_pipeline.cluster.head import named_cluster, unanswered
from ray_pipeline.cluster.membership import Owner, place_of
from ray_pipeline.cluster.runtime import join
from ray_pipeline.errors import ConfigurationError, EnvironmentProblem, RayPipelineError, StageFailedError

__all__ = ["ask_job", "joined_cluster", "pipelines", "stop_pipeline"]

_log = logging.getLogger(__name__)

_ANSWER_S = 10.0
_LOOK_S = 0.5
_LAST_S = 30.0


@contextlib.contextmanager
def joined_cluster(address: str | None) -> Iterator[None]:
    """Join a Ray cluster for a while.

    Args:
        address: of the cluster; None = RAY_ADDRESS.

    Raises:
        EnvironmentProblem: there is none, or it cannot be joined.
    """
    address = named_cluster(address)
    if address is None:
        raise EnvironmentProblem(
            problem="no Ray cluster is known: no pipeline runs in the state directory",
            fix="Name its --state-dir, or --ray-address",
        )
    join(address, logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def pipelines() -> list[dict[str, Any]]:
    """The pipelines on the cluster that was joined, whichever stages they run.

    Returns:
        Of each ``name``, ``stages``, ``bootstrap_servers``, ``node`` and ``pid`` of the process that drives it, ``generator``
        (``state``, ``actors``) and ``job`` (the record of its Spark job); the last two are empty where it has none. Where no actor
        answers, ``stages`` are those that have an actor.
    """
    return [_row(name, actors) for name, actors in sorted(_actors().items())]


def _row(name: str, actors: list[tuple[str, Any]]) -> dict[str, Any]:
    said = _ask(actors, "describe")
    generators = sum(stage == "generate" for stage, _ in actors)
    row: dict[str, Any] = {
        "name": name,
        "stages": sorted({stage for stage, _ in actors}),
        "bootstrap_servers": "",
        "node": "",
        "pid": None,
        "generator": {"state": "no answer", "actors": generators} if generators else {},
        "job": {"state": "no answer"} if any(stage == "process" for stage, _ in actors) else {},
    }
    for stage, found in said:
        row |= {
            "stages": list(found["stages"]),
            "bootstrap_servers": found["bootstrap"],
            "node": found["node"],
            "pid": found["pid"],
        }
        if stage == "generate":
            row["generator"] |= found["generator"]
        elif stage == "process":
            row["job"] = found["job"]
    return row


def stop_pipeline(name: str, deadline_s: float) -> None:
    """Have the process that drives a pipeline end it in order, and wait until it has ended.

    Leaves the cluster that was joined where that ends with the pipeline.

    Args:
        name: the pipeline's name, as :func:`pipelines` has it.
        deadline_s: longest time, seconds.

    Raises:
        ConfigurationError: there is no such pipeline on the cluster.
        StageFailedError: none of its actors answers, or it has not ended in time.
    """
    actors = _actors().get(name)
    if not actors:
        raise ConfigurationError(problem=f"no pipeline {name!r} runs on this cluster", fix="See ray-pipeline jobs list")
    owners = [found for _, found in _ask(actors, "describe")]
    if not owners or not _ask(actors, "ask_to_stop"):
        raise StageFailedError(problem=f"no actor of the pipeline {name} answers", fix="Try again in a moment")
    owner = Owner(**{field: owners[0][field] for field in Owner.__slots__})
    context = ray.get_runtime_context()
    here, address = owner.node == context.get_node_id(), context.gcs_address
    if owner.has_ray:
        ray.shutdown()
    deadline = time.monotonic() + deadline_s
    while not unanswered(address, _LOOK_S) if owner.has_ray else name in _actors():
        if time.monotonic() > deadline:
            raise StageFailedError(
                problem=f"the pipeline {name} was told to stop, and has not ended within {deadline_s:.0f} s",
                fix=f"It may be working off what was sent: wait longer, or end process {owner.pid}",
            )
        time.sleep(_LOOK_S)
    # its broker ends after its actors; a process that has more to do than the pipeline lives on
    until = min(deadline, time.monotonic() + _LAST_S)
    while here and owner.alive and time.monotonic() < until:
        time.sleep(_LOOK_S)


def _ask(actors: list[tuple[str, Any]], method: str) -> list[tuple[str, Any]]:
    """What those actors say that answer in time, each with its stage."""
    asked = {getattr(handle, method).remote(): stage for stage, handle in actors}
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    said = []
    for reference in ready:
        try:
            said.append((asked[reference], ray.get(reference)))
        except RayError as error:
            _log.info("an actor of stage %s does not answer: %s", asked[reference], error)
    return said


def _actors() -> dict[str, list[tuple[str, Any]]]:
    """The actors of each pipeline, each with its stage."""
    found = defaultdict(list)
    for actor in list_named_actors(all_namespaces=True):
        place = place_of(str(actor["name"]))
        if place is None:
            continue
        with contextlib.suppress(ValueError):  # it has ended since
            found[place[0]].append((place[1], ray.get_actor(actor["name"], namespace=actor["namespace"])))
    return dict(found)


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
    jobs = {known: handle for known, actors in _actors().items() for stage, handle in actors if stage == "process"}
    if name is None and len(jobs) == 1:
        name = next(iter(jobs))
    if name not in jobs:
        raise EnvironmentProblem(
            problem=f"no running Spark job {name or ''} was found on this cluster", fix="See ray-pipeline jobs list"
        )
    try:
        return ray.get(getattr(jobs[name], method).remote(*args), timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, RayPipelineError):
            raise error.cause from error
        raise StageFailedError(problem=f"the Spark job failed: {error.cause}", fix="") from error
    except (RayError, GetTimeoutError) as error:
        raise StageFailedError(
            problem=f"the Spark job does not answer ({type(error).__name__})", fix="Try again"
        ) from error
