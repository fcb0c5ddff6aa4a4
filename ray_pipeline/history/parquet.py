"""History as Parquet: ratings of a run made again, or ahead, by a Spark job of any number of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import ConfigurationError, ProcessingError
from ray_pipeline.history.making import COLUMNS, ModelSource, ratings
from ray_pipeline.history.ranges import ShardRange, cut

__all__ = ["ParquetOrder", "write"]

_RATINGS_PER_TASK = 250_000  # so that progress shows, and a task that is lost costs little


@dataclass(frozen=True, slots=True)
class ParquetOrder:
    """What is wanted.

    Attributes:
        uri: where to, a Hadoop URI; there must be nothing yet.
        source: makes the models.
        lived: progress of each shard, by partition: its plan has the times.
        ranges: which ratings.
        tasks: how many tasks; None = as suits their number and the cores.
    """

    uri: str
    source: ModelSource
    lived: dict[int, ShardProgress]
    ranges: tuple[ShardRange, ...]
    tasks: int | None = None

    @property
    def total(self) -> int:
        """How many ratings."""
        return sum(map(len, self.ranges))


def write(spark: Any, order: ParquetOrder) -> None:
    """Make and write the ratings; all are there in the end, or none. Blocks.

    Raises:
        ConfigurationError: there is something at the URI already, or the URI is none.
        ProcessingError: the job failed.
    """
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import AnalysisException, IllegalArgumentException

    broken = order.source.settings.text_fault
    if broken:
        raise ConfigurationError(
            problem=f"history as Parquet does not go with {broken}: columns hold no broken text",
            fix="Have it made with --to ratings",
        )
    cores = spark.sparkContext.defaultParallelism
    tasks = order.tasks or max(cores, -(-order.total // _RATINGS_PER_TASK))
    wanted = [list(piece) for piece in cut(order.ranges, tasks)]
    rows = spark.range(0, tasks, 1, tasks).mapInArrow(_task(order, wanted), COLUMNS)
    try:
        rows.write.mode("errorifexists").parquet(order.uri)
    except (AnalysisException, IllegalArgumentException) as error:
        raise _refusal(order.uri, str(error)) from None
    except Py4JJavaError as error:
        text = error.java_exception.toString()
        if "No FileSystem for scheme" in text or "UnsupportedFileSystem" in text or "URISyntax" in text:
            raise _refusal(order.uri, text) from None
        raise ProcessingError(
            problem=f"history could not be written to {order.uri}: {text.splitlines()[0][:500]}",
            fix="Nothing of it is there: correct the cause and try again",
        ) from error


def _task(
    order: ParquetOrder, wanted: list[list[ShardRange]]
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    source, lived = order.source, order.lived

    def make(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column("id").to_pylist():
                yield from ratings(source, lived, wanted[number])

    return make


def _refusal(uri: str, text: str) -> ConfigurationError:
    if "PATH_ALREADY_EXISTS" in text:
        return ConfigurationError(
            problem=f"there is something at {uri} already", fix="Name another folder, or remove it"
        )
    return ConfigurationError(
        problem=f"history cannot be written to {uri}: {text.splitlines()[0][:300]}",
        fix="Give --to ratings, or a Hadoop URI such as file:///data/history",
    )
