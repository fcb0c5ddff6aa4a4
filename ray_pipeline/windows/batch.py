"""The batch report: everything in the ratings topic, or in the archive, as a Spark job beside the streaming query."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from pyspark.sql import functions as F

from ray_pipeline.config import Settings, flag_of
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.windows.archive import RATINGS
from ray_pipeline.windows.decoding import in_contract_form
from ray_pipeline.windows.job import parse
from ray_pipeline.windows.source import source_options
from spark_compat.hadoop import exists
from spark_compat.usage import pool_of_jobs

__all__ = ["POOL", "refuse_others", "report"]

POOL = "batch"
_TOP = 10
_STORE_S = 5.0


def refuse_others(settings: Settings, bootstrap: str, asked: Mapping[str, Any], catalogue: str | None) -> None:
    """Refuse to report on something else than what the Spark job that runs reads.

    Args:
        settings: the job's.
        bootstrap: the job's brokers.
        asked: settings by name that somebody gave; they must be the job's.
        catalogue: digest of the catalogue that somebody gave; None = nobody did.

    Raises:
        ConfigurationError: one of them is not the job's.
    """
    runs = {name: getattr(settings, name) for name in asked} | {"bootstrap_servers": bootstrap}
    for name, value in asked.items():
        if value != runs[name]:
            raise ConfigurationError(
                problem=f"the pipeline that runs here has {name}={runs[name]}, and its Spark job reports on that, not on {value}",
                fix=f"Leave {flag_of(name)} out; or name the state directory of another pipeline (--state-dir)",
            )
    if catalogue is not None and catalogue != load_catalogue(settings).digest:
        raise ConfigurationError(
            problem="the pipeline that runs here has another catalogue, and its Spark job reports with that",
            fix="Leave --catalog, --model and --movies out; or name the state directory of another pipeline (--state-dir)",
        )


def report(spark: Any, settings: Settings, bootstrap: str, archive: str | None = None) -> dict[str, Any]:
    """Rating histogram, top movies by hour, ratings by genre.

    Args:
        spark: the session; the job runs in its pool ``batch``.
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        archive: read this archive, a Hadoop URI, in place of the topic; it has no rejected records.

    Raises:
        ConfigurationError: the archive has no ratings.

    Returns:
        ``source``, ``pool`` (that Spark ran it in), ``started_ms`` and ``ended_ms`` (epoch milliseconds), ``total``, ``rejected``,
        ``histogram`` [{rating, count}], ``top_movies`` [{period_start_ms, rank, movieId, title, count, avg_rating}],
        ``genres`` [{genre, count, avg_rating}].
    """
    group = f"batch-{uuid.uuid4().hex[:8]}"
    spark.sparkContext.setLocalProperty("spark.scheduler.pool", POOL)
    spark.sparkContext.setLocalProperty("spark.jobGroup.id", group)
    try:
        started_ms = time.time_ns() // 1_000_000
        rows = _of_topic(spark, settings, bootstrap) if archive is None else _of_archive(spark, archive)
        found = _report(rows, settings)
        source = settings.ratings_topic if archive is None else archive
        return {
            "source": source,
            "pool": _pool(spark, group),
            "started_ms": started_ms,
            "ended_ms": time.time_ns() // 1_000_000,
            **found,
        }
    finally:
        spark.sparkContext.setLocalProperty("spark.scheduler.pool", None)
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)


def _pool(spark: Any, group: str) -> str | None:
    """The pool that the report's stages ran in; Spark's status store hears of a stage a little later."""
    until = time.monotonic() + _STORE_S
    while (pool := pool_of_jobs(spark.sparkContext, group)) is None and time.monotonic() < until:
        time.sleep(0.01)
    return pool


def _of_topic(spark: Any, settings: Settings, bootstrap: str) -> Any:
    raw = (
        spark.read.format("kafka")
        .options(**source_options(bootstrap))
        .option("subscribe", settings.ratings_topic)
        .option("startingOffsets", "earliest")
        .option("endingOffsets", "latest")
        .load()
    )
    return parse(in_contract_form(raw, settings), settings.guard_ms)


def _of_archive(spark: Any, archive: str) -> Any:
    folder = f"{archive.rstrip('/')}/{RATINGS}"
    if not exists(spark, folder):
        raise ConfigurationError(
            problem=f"there is no archive of ratings at {archive}", fix="Name the URI that run was given with --archive"
        )
    half = (F.col("rating") * 2).cast("int").alias("half")
    return spark.read.parquet(folder).select("movieId", half, F.col("timestamp").alias("event_ms"))


def _report(rows: Any, settings: Settings) -> dict[str, Any]:
    hour_ms = 3_600_000
    # one pass; what is left is small enough for the driver
    cells = (
        rows.groupBy((F.col("event_ms") - F.col("event_ms") % hour_ms).alias("period_ms"), "movieId", "half")
        .count()
        .toArrow()
        .to_pandas()
    )
    invalid = cells["half"].isna()
    rejected = int(cells.loc[invalid, "count"].sum())
    cells = cells[~invalid].astype({"period_ms": "int64", "movieId": "int64", "half": "int64"})
    cells["half_sum"] = cells["half"] * cells["count"]
    histogram = cells.groupby("half")["count"].sum().reindex(range(1, 11), fill_value=0)
    catalogue = load_catalogue(settings)
    movies = cells.groupby(["period_ms", "movieId"], as_index=False)[["count", "half_sum"]].sum()
    movies = movies.sort_values(["period_ms", "count", "movieId"], ascending=[True, False, True])
    top = movies.groupby("period_ms").head(_TOP)
    ranks = top.groupby("period_ms").cumcount() + 1
    by_movie = cells.groupby("movieId", as_index=False)[["count", "half_sum"]].sum()
    return {
        "total": int(cells["count"].sum()),
        "rejected": rejected,
        "histogram": [{"rating": half / 2, "count": int(n)} for half, n in histogram.items()],
        "top_movies": [
            {
                "period_start_ms": int(row.period_ms),
                "rank": int(rank),
                "movieId": int(row.movieId),
                "title": catalogue.title_of(int(row.movieId)),
                "count": int(row.count_),
                "avg_rating": round(row.half_sum / 2 / row.count_, 6),
            }
            for row, rank in zip(top.rename(columns={"count": "count_"}).itertuples(), ranks, strict=True)
        ],
        "genres": _by_genre(by_movie, catalogue),
    }


def _by_genre(by_movie: Any, catalogue: Any) -> list[dict[str, Any]]:
    at = catalogue.index_of(by_movie["movieId"].to_numpy())
    known = at >= 0
    matrix = catalogue.genre_matrix[at[known]].astype("int64")
    counts = by_movie["count"].to_numpy()[known] @ matrix
    sums = by_movie["half_sum"].to_numpy()[known] @ matrix
    rows = [
        {"genre": name, "count": int(n), "avg_rating": round(float(s) / 2 / int(n), 6)}
        for name, n, s in zip(catalogue.genre_names, counts, sums, strict=True)
        if n
    ]
    return sorted(rows, key=lambda row: (-row["count"], row["genre"]))
