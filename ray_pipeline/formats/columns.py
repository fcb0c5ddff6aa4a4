"""Protobuf values as columns: what a Spark task does with them, without a registry."""

from __future__ import annotations

import pyarrow as pa
from google.protobuf.message import DecodeError

from ray_pipeline.config import FIELDS
from ray_pipeline.formats.fields import Layout
from ray_pipeline.formats.schema import REGISTRY_HEADER_BYTES, message_class

__all__ = ["protobuf_columns"]

_FIRST_MESSAGE = b"\0"  # which one of its schema a value is


def protobuf_columns(values: pa.Array, layout: Layout) -> pa.StructArray:
    """Values → the fields of their ratings.

    Args:
        values: shape (n,), binary.
        layout: names and padding.

    Returns:
        Shape (n,), a struct of the four fields by their names in the layout: int64, rating double; all null where the value is no
        message of the layout's schema. Which id its schema has there does not count, as in Avro's column.
    """
    message, body = message_class(layout), REGISTRY_HEADER_BYTES + len(_FIRST_MESSAGE)
    names = [layout.names[name] for name in FIELDS]
    nothing = (None,) * len(names)

    def fields(value: bytes | None) -> tuple[int | float | None, ...]:
        if value is None or value[:1] != b"\0" or value[REGISTRY_HEADER_BYTES:body] != _FIRST_MESSAGE:
            return nothing
        try:
            found = message.FromString(value[body:])
        except DecodeError:
            return nothing
        return tuple(getattr(found, name) for name in names)

    rows = [fields(value) for value in values.to_pylist()]
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    kinds = (pa.float64() if name == "rating" else pa.int64() for name in FIELDS)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    return pa.StructArray.from_arrays(arrays, names)
