"""Ratings as Parquet by date and hour, each once: what is done with a micro-batch of the archive's own query.

A micro-batch has the same ratings however often it runs, since Spark writes its offsets down first. They are written to a folder
that no reader looks into, one file an hour, then each file is moved to a name made of the number of the batch, unless it is there
already. So a batch that is run again after a crash adds what is missing, and nothing twice.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

from ray_pipeline.errors import ConfigurationError, StateMismatchError
from ray_pipeline.windows.job import valid
from ray_pipeline.windows.marker import MARKER
from spark_compat.hadoop import exists, list_files, move_new, read_text, remove, replace

__all__ = ["RATINGS", "RatingsArchive", "claim"]

RATINGS = "ratings"
"""Folder of the ratings in an archive."""
_STAGING = "_staging"  # readers of Parquet pass over names like this


class RatingsArchive:
    """Called by Spark with each micro-batch of the archive's query.

    Args:
        spark: the session.
        uri: the archive, a Hadoop URI.
        then: is called after each micro-batch.
        guard_ms: see :func:`valid`.
    """

    def __init__(self, spark: Any, uri: str, then: Callable[[], None], guard_ms: int = 0) -> None:
        self._guard_ms = guard_ms
        self.ratings = 0
        self.batch = -1
        self._spark = spark
        self._uri = uri.rstrip("/")
        self._then = then

    def __call__(self, frame: Any, batch: int) -> None:
        """Archive a micro-batch."""
        from pyspark.sql import Observation
        from pyspark.sql import functions as F

        staging = f"{self._uri}/{_STAGING}/{batch}"
        seen = Observation()
        time = F.timestamp_millis("timestamp")
        rows = (
            valid(frame, self._guard_ms)
            .withColumns({"date": F.date_format(time, "yyyy-MM-dd"), "hour": F.date_format(time, "HH")})
            .observe(seen, F.count(F.lit(1)).alias("ratings"))
            # one task: a file an hour, in a fixed order, and the other cores are left to the windows
            .coalesce(1)
            .sortWithinPartitions("date", "hour", "partition", "offset")
        )
        rows.write.mode("overwrite").partitionBy("date", "hour").parquet(staging)
        for name in list_files(self._spark, staging):
            folder, _, file = name.rpartition("/")
            if folder and file.endswith(".parquet"):
                target = f"{self._uri}/{RATINGS}/{folder}/batch-{batch:09d}.parquet"
                move_new(self._spark, f"{staging}/{name}", target)
        remove(self._spark, f"{self._uri}/{_STAGING}")
        if batch > self.batch:  # else it is run again, because what came after this failed
            self.ratings += seen.get["ratings"]
            self.batch = batch
        self._then()


def claim(spark: Any, uri: str, checkpoint: str) -> None:
    """See that archive and checkpoint belong together: the one has what the other says was written.

    Raises:
        ConfigurationError: the archive cannot be written.
        StateMismatchError: they do not.
    """
    here, there = (f"{place.rstrip('/')}/{MARKER}" for place in (checkpoint, uri))
    try:
        known, found = read_text(spark, here), read_text(spark, there)
        if found is None and known is None:
            found = json.dumps({"archive": uuid.uuid4().hex})
            replace(spark, there, found.encode())
    except Exception as error:
        raise ConfigurationError(
            problem=f"the archive {uri} cannot be written: {_first_line(error)}",
            fix="Give --archive a Hadoop URI that can be written, such as file:///data/archive",
        ) from error
    if known is None and not exists(spark, f"{uri.rstrip('/')}/{RATINGS}"):
        replace(spark, here, (found or "").encode())
    elif known is None:
        raise StateMismatchError(
            problem=f"the archive {uri} has ratings that the checkpoint {checkpoint} knows nothing of",
            fix="Name another --archive, or remove that one",
        )
    elif known != found:
        raise StateMismatchError(
            problem=f"the checkpoint {checkpoint} says that ratings were archived, and {uri} is not where they are",
            fix="Name the archive they are in, or remove this checkpoint to archive everything anew",
        )


def _first_line(error: Exception) -> str:
    java = getattr(error, "java_exception", None)
    text = str(java.toString() if java is not None else error)
    return text.splitlines()[0][:300]
