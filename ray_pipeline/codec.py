"""A rating as Kafka key and value, whole columns at a time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.events import EventBatch

__all__ = ["InvalidRating", "decode_value", "encode_keys", "encode_values"]

_RATING_TEXT = pa.array([f"{half / 2:.1f}" for half in range(11)])
_HALF_STARS = {half / 2 for half in range(1, 11)}
_FIELDS = ("userId", "movieId", "rating", "timestamp")


class InvalidRating(ValueError):
    """A record's value is no rating; the text says why."""


def encode_keys(batch: EventBatch) -> list[bytes]:
    """The key of each rating: the user id as a decimal string."""
    return pc.cast(pc.cast(pa.array(batch.user_ids), pa.string()), pa.binary()).to_pylist()  # type: ignore[no-any-return]


def encode_values(batch: EventBatch) -> list[bytes]:
    """The value of each rating, such as ``{"userId":116483,"movieId":24424,"rating":3.0,"timestamp":1762796864000}``."""
    joined = pc.binary_join_element_wise(
        '{"userId":',
        pc.cast(pa.array(batch.user_ids), pa.string()),
        ',"movieId":',
        pc.cast(pa.array(batch.movie_ids), pa.string()),
        ',"rating":',
        _RATING_TEXT.take(pa.array(batch.half_stars.astype(np.int32))),
        ',"timestamp":',
        pc.cast(pa.array(batch.timestamps_ms), pa.string()),
        "}",
        "",
    )
    return pc.cast(joined, pa.binary()).to_pylist()  # type: ignore[no-any-return]


def decode_value(value: bytes | None) -> dict[str, Any]:
    """A rating from a record's value, checked.

    Raises:
        InvalidRating: it is no JSON object, lacks a field, or a field is out of range.
    """
    try:
        fields = json.loads(value or b"")
    except ValueError as error:
        raise InvalidRating("not JSON") from error
    if not isinstance(fields, dict):
        raise InvalidRating("not a JSON object")
    for name in _FIELDS:
        number = fields.get(name)
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise InvalidRating(f"{name} is missing or not a number")
    if fields["rating"] not in _HALF_STARS:
        raise InvalidRating("rating is not one of 0.5, 1.0, … 5.0")
    if any(not isinstance(fields[n], int) or fields[n] < 1 for n in ("userId", "movieId", "timestamp")):
        raise InvalidRating("userId, movieId and timestamp must be whole numbers above 0")
    return {name: fields[name] for name in _FIELDS}
