"""The query that keeps an archive of ratings and windows: started, looked after, brought to the end of what there is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.errors import ProcessingError
from ray_pipeline.restart import Decision, RestartPolicy
from ray_pipeline.windows.archive import RatingsArchive, claim
from ray_pipeline.windows.archived import WindowsArchive
from ray_pipeline.windows.decoding import in_contract_form
from ray_pipeline.windows.source import source_options
from ray_pipeline.windows.spec import WindowSpec

__all__ = ["QUERY", "ArchiveQuery"]

_log = logging.getLogger(__name__)

QUERY = "archive"
_POOL = "batch"
_IDLE_S = 0.05
_MOST_AT_ONCE = 20_000_000  # records of a micro-batch, so that the first one over an old topic ends some time


class ArchiveQuery:
    """Keeps an archive, on the session of the windowing job.

    Args:
        settings: all settings; ``archive`` is set.
        bootstrap: brokers, HOST:PORT[,…].
        spark: the session.
        specs: the window kinds.
        watermark_ms: see :class:`WindowsArchive`.
        clock: tells the time.
    """

    def __init__(
        self,
        settings: Settings,
        bootstrap: str,
        spark: Any,
        specs: tuple[WindowSpec, ...],
        watermark_ms: Callable[[], int],
        clock: Clock,
    ) -> None:
        assert settings.archive is not None
        self._settings = settings
        self._bootstrap = bootstrap
        self._spark = spark
        self._uri, self._checkpoint = settings.archive, settings.archive_checkpoint_uri
        self._clock = clock
        self._policy = RestartPolicy(most=10)
        self._query: Any = None
        self._starting = threading.RLock()  # it is looked after and brought to the end by different threads
        self._flushing = self._flushed = False
        self._restarts = 0
        self._reason = ""
        claim(spark, self._uri, self._checkpoint)
        self._windows = WindowsArchive(
            spark, bootstrap, settings.metrics_topic, self._uri, self._checkpoint, specs, watermark_ms
        )
        self._ratings = RatingsArchive(spark, self._uri, self._windows.write, settings.guard_ms)

    def start(self) -> None:
        """Start the query, from its checkpoint when there is one."""
        self._start(processingTime=f"{round(self._settings.archive_interval_s * 1000)} milliseconds")

    def look(self) -> str | None:
        """Start a query that has ended again; why it is given up, when it is."""
        with self._starting:
            if self._flushing or self._flushed or self._query is None or self._query.isActive:
                return None
            self._reason = why(self._query.exception(), self._uri)
            _log.error("the archive's query ended: %s", self._reason)
            if self._policy.failed(self._clock.now_ms()) is Decision.GIVE_UP:
                return self._reason
            self._restarts += 1
            self.start()
        return None

    def flush(self, deadline_s: float) -> bool:
        """Have all in the archive that is in the topics now, also windows that are not final.

        Returns:
            Whether that happened within ``deadline_s`` seconds; if not, call it again.

        Raises:
            ProcessingError: it cannot.
        """
        end = time.monotonic() + deadline_s
        try:
            if not self._flushing and not self._begin_to_flush(end):
                return False
            if not self._query.awaitTermination(max(1, round(end - time.monotonic()))):
                return False
            self._windows.write(all_of_them=True)
        except Exception as error:
            self._flushing = False
            self._reason = why(error, self._uri)
            if self._policy.failed(self._clock.now_ms()) is Decision.GIVE_UP:
                raise ProcessingError(
                    problem=f"the archive is not complete: {self._reason}",
                    fix="The next run on this state directory completes it",
                ) from error
            self._restarts += 1
            return False
        self._flushing, self._flushed = False, True
        return True

    def _begin_to_flush(self, end: float) -> bool:
        with self._starting:
            if not self._idle(end):
                return False
            self.stop()
            self._start(availableNow=True)
            self._flushing = True
        return True

    def _idle(self, end: float) -> bool:
        """Wait for the end of the micro-batch that is under way, at most until ``end``, and say whether there is none."""
        while self._query.isActive and self._query.status["isTriggerActive"]:
            if time.monotonic() > end:
                return False
            time.sleep(_IDLE_S)
        return True

    def stop(self) -> None:
        """End the query; what was under way is done again at the next start."""
        if self._query is not None and self._query.isActive:
            self._query.stop()

    def record(self) -> dict[str, Any]:
        """How it stands, for the job's record; ratings are those of this process."""
        return {
            "uri": self._uri,
            "batch": self._ratings.batch,
            "ratings": self._ratings.ratings,
            "complete": self._flushed,
            "restarts": self._restarts,
            "reason": self._reason,
        }

    def _start(self, **trigger: Any) -> None:
        raw = (
            self._spark.readStream.format("kafka")
            .options(**source_options(self._bootstrap))
            .option("subscribe", self._settings.ratings_topic)
            .option("startingOffsets", "earliest")
            .option("failOnDataLoss", "true")
            .option("maxOffsetsPerTrigger", str(_MOST_AT_ONCE))
            .load()
        )
        writer = (
            in_contract_form(raw, self._settings)
            .writeStream.queryName(QUERY)
            .option("checkpointLocation", self._checkpoint)
            .foreachBatch(self._ratings)
            .trigger(**trigger)
        )
        # the pool is a property of the thread that starts the query
        self._spark.sparkContext.setLocalProperty("spark.scheduler.pool", _POOL)
        try:
            self._query = writer.start()
        finally:
            self._spark.sparkContext.setLocalProperty("spark.scheduler.pool", None)


def why(error: Any, uri: str) -> str:
    """The useful line of what ended the query."""
    text = str(error) if error is not None else "it was stopped from outside"
    if "No space left on device" in text:
        return f"the disk of the archive {uri}, or of Spark's local files, is full. Free some space: nothing is skipped"
    if "Some data may have been lost" in text or "KAFKA_DATA_LOSS" in text:
        gone = f"ratings that are not in the archive {uri} yet are gone from the topic"
        return f"{gone}. Clear checkpoint and topics with: ray-pipeline reset, and name another --archive"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = next((line for line in lines if "Error" in line or "Exception" in line), lines[0])
    return f"the archive {uri}: {found[:400]}"
