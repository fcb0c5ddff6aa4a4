"""A Spark job that runs beside the stream, one at a time: started, asked how far it is, cancelled."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any

from ray_pipeline.errors import RayPipelineError
from spark_compat.usage import pool_of_jobs

__all__ = ["POOL", "SparkJob"]

_log = logging.getLogger(__name__)

POOL = "generator"


class SparkJob:
    """Runs a function on a thread of its own, with its Spark jobs in pool ``generator``.

    Args:
        spark: the session.
        total: ratings to make.
        work: does it; is given this object, to say how far it is.
    """

    def __init__(self, spark: Any, total: int, work: Callable[[SparkJob], None]) -> None:
        self._context = spark.sparkContext
        self._total = total
        self._work = work
        self._group = f"history-{uuid.uuid4().hex[:8]}"
        self._state = "running"
        self._error: RayPipelineError | None = None
        self._reason = ""
        self._done: int | None = None
        self._pool: str | None = None
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def start(self) -> None:
        """Begin; does not wait."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._state == "running"

    def reached(self, done: int) -> None:
        """Say how many ratings are made; without it the tasks that have ended are counted."""
        self._done = done

    def status(self) -> dict[str, Any]:
        """``state`` (running, done, failed, cancelled), ratings ``done`` of ``total``, Spark's ``pool``, ``error``, ``reason``."""
        self._pool = self._pool or pool_of_jobs(self._context, self._group)
        done = self._total if self._state == "done" else self._done if self._done is not None else self._by_tasks()
        return {
            "state": self._state,
            "done": min(done, self._total),
            "total": self._total,
            "pool": self._pool,
            "error": self._error,
            "reason": self._reason,
        }

    def cancel(self) -> None:
        """End its tasks; does not wait."""
        if self.running:
            self._state = "cancelled"
            self._context.cancelJobGroup(self._group)

    # -- inside

    def _run(self) -> None:
        self._context.setLocalProperty("spark.scheduler.pool", POOL)
        self._context.setJobGroup(self._group, "history", interruptOnCancel=True)
        try:
            self._work(self)
            if self.running:
                self._state = "done"
        except Exception as error:  # noqa: BLE001 - kept for who asks
            if self.running:
                _log.error("history: %s", error, exc_info=not isinstance(error, RayPipelineError))
                self._error = error if isinstance(error, RayPipelineError) else None
                self._reason = str(error).splitlines()[0][:500] if str(error) else type(error).__name__
                self._state = "failed"

    def _by_tasks(self) -> int:
        tracker = self._context.statusTracker()
        ended = wanted = 0
        for job in tracker.getJobIdsForGroup(self._group):
            for stage in getattr(tracker.getJobInfo(job), "stageIds", ()):
                found = tracker.getStageInfo(stage)
                if found is not None:
                    ended, wanted = ended + found.numCompletedTasks, wanted + found.numTasks
        return self._total * ended // wanted if wanted else 0
