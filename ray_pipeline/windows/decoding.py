"""Values in any format of ours → values in the contract's form, in Spark; the job itself knows that form alone."""

from __future__ import annotations

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import arrow_udf

from ray_pipeline.config import FIELDS, Settings
from ray_pipeline.formats.columns import protobuf_columns
from ray_pipeline.formats.fields import Layout
from ray_pipeline.formats.schema import REGISTRY_HEADER_BYTES, avro_schema

__all__ = ["in_contract_form", "with_values_of"]

_TYPES = {"userId": "LONG", "movieId": "LONG", "rating": "DOUBLE", "timestamp": "LONG"}


def in_contract_form(raw: DataFrame, settings: Settings) -> DataFrame:
    """Kafka records → the same records, their values in the contract's form.

    One that is not in the run's format has no value: it is no rating, also where it would be one in the contract's form.

    Args:
        raw: records as Spark's Kafka source has them.
        settings: the format is used.
    """
    if settings.plain_format:
        return raw
    layout = Layout.of(settings)
    found = _decoded(settings, layout).alias("found")
    rating = F.struct(*(F.col(f"found.{layout.names[name]}").alias(name) for name in FIELDS))
    known = F.coalesce(*(F.col(f"found.{layout.names[name]}").cast("string") for name in FIELDS)).isNotNull()
    value = F.when(known, F.to_json(rating).cast("binary"))
    return raw.withColumn("found", found).withColumn("value", value).drop("found")


def with_values_of(raw: DataFrame, rejects: DataFrame, settings: Settings) -> DataFrame:
    """Rejected records with the values that they came with.

    Args:
        raw: records as Spark's Kafka source has them.
        rejects: some of them, found in the contract's form.
        settings: the format is used.
    """
    if settings.plain_format:
        return rejects
    return rejects.drop("value").join(raw.select("partition", "offset", "value"), ["partition", "offset"])


def _decoded(settings: Settings, layout: Layout) -> Column:
    """The struct of a value's fields, all null where it is not in the format."""
    schema = ", ".join(f"`{layout.names[name]}` {kind}" for name, kind in _TYPES.items())
    if settings.format == "json":
        return F.from_json(F.col("value").cast("string"), schema, {"mode": "PERMISSIVE"})
    if settings.format == "protobuf":

        def columns(values: pa.Array) -> pa.Array:
            return protobuf_columns(values, layout)

        found: Column = arrow_udf(columns, schema)("value")  # type: ignore[call-overload]  # which kind, the hints say
        return found
    from pyspark.sql.avro.functions import from_avro

    body = F.substring("value", REGISTRY_HEADER_BYTES + 1, 2**31 - 1)
    record = from_avro(body, avro_schema(layout), {"mode": "PERMISSIVE"})
    return F.when(F.substring("value", 1, 1) == F.lit(b"\0"), record)
