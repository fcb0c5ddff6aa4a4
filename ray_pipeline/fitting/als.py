"""Latent factors by alternating least squares, as Spark's ML library has it, on this machine alone."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet

from ray_pipeline.errors import EnvironmentProblem, ProcessingError
from spark_compat.errors import SparkCompatError
from spark_compat.paths import hadoop_uri
from spark_compat.session import SparkSessionOwner

__all__ = ["Factoriser", "Residuals", "SparkAls"]

Floats = npt.NDArray[np.float32]

_BLOCKS = 8  # fixed, so that the factors do not depend on how many cores there are
_CHECKPOINT_EVERY = 4  # iterations: Spark walks what led to the factors recursively, and its stack ends after some more
_ROWS_AT_ONCE = 1 << 20
_TELL_EVERY_S = 10.0
_HEAP_LEAST_MB, _HEAP_MOST_MB = 1_024, 16_384


@dataclass(frozen=True, slots=True)
class Residuals:
    """What the biases leave unexplained.

    Attributes:
        users: how many there are.
        movies: how many there are.
        user: shape (n,), int32, 0 … users - 1.
        movie: shape (n,), int32, 0 … movies - 1.
        stars: shape (n,), float32.
    """

    users: int
    movies: int
    user: npt.NDArray[np.int32]
    movie: npt.NDArray[np.int32]
    stars: Floats


class Factoriser(Protocol):
    """Finds factors whose products come close to residuals."""

    def __call__(
        self, residuals: Residuals, rank: int, seed: int, tell: Callable[[str], None]
    ) -> tuple[Floats, Floats]:
        """Factors of users, shape (users, rank), and movies, shape (movies, rank); 0 for those without a residual."""


@dataclass(frozen=True, slots=True)
class SparkAls:
    """ALS with weighted regularisation (Zhou et al., "Large-scale parallel collaborative filtering for the Netflix prize", 2008).

    Attributes:
        regularisation: λ; what a factor costs grows with the number of its ratings.
        iterations: how often users and movies are solved for in turn.
    """

    regularisation: float = 0.05
    iterations: int = 15

    def __call__(
        self, residuals: Residuals, rank: int, seed: int, tell: Callable[[str], None]
    ) -> tuple[Floats, Floats]:
        """Factors of users and movies. Starts a Spark session in this process, and ends it.

        Raises:
            EnvironmentProblem: there is no Java.
            ProcessingError: Spark failed, such as for lack of memory.
        """
        from py4j.protocol import Py4JJavaError

        owner = SparkSessionOwner("ray-pipeline-fit", _conf(), 0, 0, "", master="local[*]")
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-pipeline-fit-")))
            try:
                spark = owner.start()
            except SparkCompatError as error:
                raise EnvironmentProblem(error.problem, error.fix) from None
            stack.callback(owner.stop)
            spark.sparkContext.setCheckpointDir(hadoop_uri(folder / "checkpoint"))
            _write(residuals, folder / "residuals.parquet")
            stack.enter_context(_Progress(spark, tell))
            try:
                model = self._als(rank, seed).fit(spark.read.parquet(hadoop_uri(folder / "residuals.parquet")))
                return (
                    _factors(model.userFactors, residuals.users, rank),
                    _factors(model.itemFactors, residuals.movies, rank),
                )
            except Py4JJavaError as error:
                raise ProcessingError(
                    f"Spark's ALS failed: {str(error.java_exception).partition(chr(10))[0]}",
                    "Give it more memory, or fewer ratings",
                ) from error

    def _als(self, rank: int, seed: int) -> Any:
        from pyspark.ml.recommendation import ALS

        return ALS(
            rank=rank,
            maxIter=self.iterations,
            regParam=self.regularisation,
            numUserBlocks=_BLOCKS,
            numItemBlocks=_BLOCKS,
            checkpointInterval=_CHECKPOINT_EVERY,
            seed=seed,
            userCol="user",
            itemCol="movie",
            ratingCol="stars",
        )


def _conf() -> dict[str, str]:
    free_mb = psutil.virtual_memory().available >> 20
    return {
        "spark.driver.memory": f"{min(_HEAP_MOST_MB, max(_HEAP_LEAST_MB, free_mb // 2))}m",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.extraJavaOptions": "-Xss8m",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
        # pieces of the file must not depend on the cores: their order is the order in which residuals are added up
        "spark.sql.files.minPartitionNum": "1",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
    }


def _write(residuals: Residuals, path: Path) -> None:
    schema = pa.schema([("user", pa.int32()), ("movie", pa.int32()), ("stars", pa.float32())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for lo in range(0, len(residuals.stars), _ROWS_AT_ONCE):
            part = slice(lo, lo + _ROWS_AT_ONCE)
            columns = [residuals.user[part], residuals.movie[part], residuals.stars[part]]
            writer.write_batch(pa.record_batch([pa.array(c) for c in columns], schema=schema))


def _factors(frame: Any, count: int, rank: int) -> Floats:
    table = frame.toArrow().combine_chunks()
    factors = np.zeros((count, rank), np.float32)
    factors[table["id"].to_numpy()] = table["features"].combine_chunks().flatten().to_numpy().reshape(-1, rank)
    return factors


class _Progress:
    """Tells from time to time how far Spark is."""

    def __init__(self, spark: Any, tell: Callable[[str], None]) -> None:
        self._tracker = spark.sparkContext.statusTracker()
        self._tell = tell
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fit-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(_TELL_EVERY_S):
            for job in self._tracker.getActiveJobsIds():
                info, active = self._tracker.getJobInfo(job), self._tracker.getActiveStageIds()
                if info is not None and active:
                    done = sum(stage < min(active) for stage in info.stageIds)
                    self._tell(f"factors: step {done + 1} of {len(info.stageIds)}")
