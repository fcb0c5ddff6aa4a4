"""What a Spark application says of itself: its pools, the pool that a job ran in, what its executors hold."""

from __future__ import annotations

import contextlib
from typing import Any

__all__ = ["MEMORY_CONF", "executor_usage", "pool_of_jobs", "scheduler_pools"]

MEMORY_CONF = {"spark.executor.processTreeMetrics.enabled": "true"}
"""Has executors report the resident memory of their processes, with their heartbeat; where there is no ``/proc``, they report none."""
_MEMORY = ("ProcessTreeJVMRSSMemory", "ProcessTreePythonRSSMemory", "ProcessTreeOtherRSSMemory")


def scheduler_pools(spark: Any) -> list[dict[str, Any]]:
    """The pools that the scheduler has, each with ``name``, ``weight`` and ``min_share`` (cores), by name."""
    found = spark.sparkContext._jsc.sc().getAllPools()
    pools = [found.apply(n) for n in range(found.size())]
    return sorted(
        ({"name": pool.name(), "weight": pool.weight(), "min_share": pool.minShare()} for pool in pools),
        key=lambda pool: str(pool["name"]),
    )


def pool_of_jobs(context: Any, group: str) -> str | None:
    """The pool that the stages of a job group ran in, those of its newest job; None = none has begun, or Spark has forgotten it.

    Args:
        context: the Spark context.
        group: the job group.
    """
    from py4j.protocol import Py4JJavaError

    tracker, store = context.statusTracker(), context._jsc.sc().statusStore()
    jobs = tracker.getJobIdsForGroup(group)
    job = tracker.getJobInfo(max(jobs)) if jobs else None
    for stage in job.stageIds if job is not None else ():
        with contextlib.suppress(Py4JJavaError):  # NoSuchElementException: only the newest stages are kept
            said = store.lastStageAttempt(stage)
            if said.status().toString() in ("ACTIVE", "COMPLETE"):
                return str(said.schedulingPool())
    return None


def executor_usage(spark: Any) -> dict[str, Any]:
    """What the executors that are registered hold.

    Returns:
        ``cpus``, ``memory_bytes`` (the most that was resident so far, None before they have said it), ``processes``.
    """
    found = spark.sparkContext._jsc.sc().statusStore().executorList(True)
    executors = [one for one in (found.apply(n) for n in range(found.size())) if one.id() != "driver"]
    peaks = [one.peakMemoryMetrics().get() for one in executors if one.peakMemoryMetrics().isDefined()]
    memory_bytes = sum(int(peak.getMetricValue(name)) for peak in peaks for name in _MEMORY)
    return {
        "cpus": float(sum(one.totalCores() for one in executors)),
        "memory_bytes": memory_bytes if memory_bytes and len(peaks) == len(executors) else None,
        "processes": len(executors),
    }
