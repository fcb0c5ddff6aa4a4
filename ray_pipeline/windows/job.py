"""The Spark job, as functions ``DataFrame → DataFrame``: one stateful aggregation that every view is derived from.

Groups are of two kinds. ``(pane, movie)`` holds an exact histogram of the movie's half stars in a pane, the piece of time that all
windows are made of; it stays in the state until the last window with that pane is over. ``(null, Kafka partition)`` holds what was
read of a partition: records, rejects, last offset, latest event time. Both lie in the same state and change in the same
micro-batch, so totals and windows always belong together.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from ray_pipeline.clock import LAST_MS
from ray_pipeline.windows.spec import Panes, WindowSpec

__all__ = ["RESULT_COLUMNS", "aggregate", "parse", "rejected", "valid"]

RESULT_COLUMNS = ("pane_ms", "id", "a0", "a1", "a2", "a3", "a4", "max_offset", "max_rejected", "max_event_ms")
"""Columns of :func:`aggregate`'s result. ``pane_ms``: the pane's start, epoch milliseconds, null for totals. ``a0 … a4``: two 32-bit
counts each, half stars 1 … 10, the odd one low; for totals ``a0`` = records and ``a1`` = rejected."""

_SCHEMA = "userId LONG, movieId LONG, rating DOUBLE, timestamp LONG"
# the name under which Spark's stateful operators look for the watermark of a grouping column
_WATERMARK_METADATA = "spark.watermarkDelayMs"


def parse(raw: DataFrame, guard_ms: int = 0) -> DataFrame:
    """Kafka records → partition, offset, reason, movieId, half, event_ms.

    ``reason`` is null for a valid rating; the last three columns are null for an invalid one.

    Args:
        raw: records of the Kafka source.
        guard_ms: how far ahead of the record's own time an event time may lie, milliseconds; 0 = as far as it likes. One event time
            in the future would otherwise move the watermark, and all that comes after it would be too late.
    """
    checked = _checked(raw, guard_ms)
    valid = F.col("reason").isNull()
    return checked.select(
        "partition",
        "offset",
        "reason",
        F.when(valid, F.col("r.movieId")).alias("movieId"),
        F.when(valid, (F.col("r.rating") * 2).cast("int")).alias("half"),
        F.when(valid, F.col("r.timestamp")).alias("event_ms"),
    )


def valid(raw: DataFrame, guard_ms: int = 0) -> DataFrame:
    """Kafka records → those that :func:`parse` finds valid: partition, offset, and the four fields of a rating."""
    fields = [F.col(f"r.{name}").alias(name) for name in ("userId", "movieId", "rating", "timestamp")]
    return _checked(raw, guard_ms).where(F.col("reason").isNull()).select("partition", "offset", *fields)


def rejected(raw: DataFrame, guard_ms: int = 0) -> DataFrame:
    """Kafka records → those that :func:`parse` finds invalid: partition, offset, timestamp_ms, reason, key, value."""
    checked = _checked(raw, guard_ms, F.unix_millis("timestamp").alias("timestamp_ms"), F.col("key"), F.col("value"))
    return checked.where(F.col("reason").isNotNull()).drop("r")


def _checked(raw: DataFrame, guard_ms: int, *more: Column) -> DataFrame:
    fields = F.from_json(F.col("value").cast("string"), _SCHEMA, {"mode": "PERMISSIVE"})
    sent_ms = F.unix_millis("timestamp")
    parsed = raw.select("partition", "offset", fields.alias("r"), sent_ms.alias("sent_ms"), *more)
    r = F.col("r")
    half = r["rating"] * 2
    nothing = r.isNull() | (r["userId"].isNull() & r["movieId"].isNull() & r["rating"].isNull())
    no_user, no_movie = r["userId"].isNull() | (r["userId"] < 1), r["movieId"].isNull() | (r["movieId"] < 1)
    no_time = r["timestamp"].isNull() | ~r["timestamp"].between(1, LAST_MS)
    reason = (
        F.when(nothing, "no JSON object with the fields of a rating")
        .when(no_user, "userId is missing or no whole number above 0")
        .when(no_movie, "movieId is missing or no whole number above 0")
        .when(r["rating"].isNull(), "rating is missing or no number")
        .when(~(half.between(1, 10) & (half == F.floor(half))), "rating is not one of 0.5, 1.0, … 5.0")
        .when(no_time, "timestamp is missing or out of range")
    )
    if guard_ms:
        ahead = r["timestamp"] - F.col("sent_ms") > guard_ms
        reason = reason.when(ahead, f"timestamp is more than {guard_ms / 1000:g} s ahead of the time it was sent")
    return parsed.withColumn("reason", reason).drop("sent_ms")


def aggregate(parsed: DataFrame, specs: tuple[WindowSpec, ...], watermark_ms: int) -> DataFrame:
    """:func:`parse`'s rows → one row a group, see :data:`RESULT_COLUMNS`."""
    # an invalid record has no event time, so it cannot move the watermark
    timed = parsed.withColumn("event_time", F.timestamp_millis("event_ms")).withWatermark(
        "event_time", f"{watermark_ms} milliseconds"
    )
    nothing = F.lit(None).cast("long")
    pane_ms = F.col("event_ms") - F.col("event_ms") % Panes(specs).size_ms
    last_end_ms = [pane_ms - pane_ms % spec.slide_ms + spec.size_ms for spec in specs]
    pane = F.struct(
        pane_ms.alias("pane_ms"), (F.greatest(*last_end_ms) if len(specs) > 1 else last_end_ms[0]).alias("end_ms")
    )
    totals = F.struct(nothing.alias("pane_ms"), nothing.alias("end_ms"))
    rows = timed.select(
        "partition",
        "offset",
        "movieId",
        "half",
        "event_ms",
        F.isnull("half").alias("bad"),
        F.explode(F.when(F.col("reason").isNull(), F.array(totals, pane)).otherwise(F.array(totals))).alias("w"),
    )
    is_total = F.isnull("w.pane_ms")
    # a pane leaves the state when the watermark has passed the last window with it: Spark looks for this metadata
    end = F.timestamp_millis("w.end_ms").alias("window_end", metadata={_WATERMARK_METADATA: watermark_ms})
    keyed = rows.select(
        end,
        F.col("w.pane_ms").alias("pane_ms"),
        F.when(is_total, F.col("partition").cast("long")).otherwise(F.col("movieId")).alias("id"),
        *(_count(i, is_total).alias(f"c{i}") for i in range(5)),
        F.when(is_total, F.col("offset")).alias("o"),
        F.when(is_total & F.col("bad"), F.col("offset")).alias("ro"),
        F.when(is_total, F.col("event_ms")).alias("e"),
    )
    grouped = keyed.groupBy("window_end", "pane_ms", "id").agg(
        *(F.sum(f"c{i}").alias(f"a{i}") for i in range(5)),
        F.max("o").alias("max_offset"),
        F.max("ro").alias("max_rejected"),
        F.max("e").alias("max_event_ms"),
    )
    return grouped.select(*RESULT_COLUMNS)


def _count(pair: int, is_total: Column) -> Column:
    """What a row adds to ``a<pair>``."""
    low, high = 2 * pair + 1, 2 * pair + 2
    stars = F.when(F.col("half") == low, 1).when(F.col("half") == high, 1 << 32).otherwise(0).cast("long")
    if pair == 0:
        return F.when(is_total, F.lit(1).cast("long")).otherwise(stars)
    if pair == 1:
        return F.when(is_total, F.col("bad").cast("long")).otherwise(stars)
    return F.when(is_total, F.lit(0).cast("long")).otherwise(stars)
