"""A rating as Kafka key and value, whole columns at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.events import EventBatch

__all__ = ["InvalidRating", "TextColumn", "decode_value", "encode_columns", "encode_keys", "encode_values"]

_RATING_TEXT = pa.array([f"{half / 2:.1f}" for half in range(11)])
_HALF_STARS = {half / 2 for half in range(1, 11)}
_FIELDS = ("userId", "movieId", "rating", "timestamp")


class InvalidRating(ValueError):
    """A record's value is no rating; the text says why."""


@dataclass(frozen=True, slots=True)
class TextColumn:
    """Texts one after another.

    Attributes:
        data: shape (bytes,), uint8: all texts, without anything between them.
        offsets: shape (n + 1,), int32, not decreasing: text i is ``data[offsets[i]:offsets[i + 1]]``.
    """

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def encode_keys(batch: EventBatch) -> list[bytes]:
    """The key of each rating: the user id as a decimal string."""
    return _keys(batch).to_pylist()  # type: ignore[no-any-return]


def encode_values(batch: EventBatch) -> list[bytes]:
    """The value of each rating, such as ``{"userId":116483,"movieId":24424,"rating":3.0,"timestamp":1762796864000}``."""
    return _values(batch).to_pylist()  # type: ignore[no-any-return]


def encode_columns(batch: EventBatch) -> tuple[TextColumn, TextColumn]:
    """Keys and values as :func:`encode_keys` and :func:`encode_values` have them, without an object for each."""
    return _column(_keys(batch)), _column(_values(batch))


def _keys(batch: EventBatch) -> pa.BinaryArray:
    return _binary(_decimal(batch.user_ids))


def _values(batch: EventBatch) -> pa.BinaryArray:
    joined = pc.binary_join_element_wise(
        '{"userId":',
        _decimal(batch.user_ids),
        ',"movieId":',
        _decimal(batch.movie_ids),
        ',"rating":',
        _RATING_TEXT.take(pa.array(batch.half_stars.astype(np.int32))),
        ',"timestamp":',
        _decimal(batch.timestamps_ms),
        "}",
        "",
    )
    return _binary(joined)


def _decimal(numbers: npt.NDArray[np.int64]) -> pa.StringArray:
    return pc.cast(pa.array(numbers), pa.string())


def _binary(texts: pa.StringArray) -> pa.BinaryArray:
    return pc.cast(texts, pa.binary())


def _column(texts: pa.BinaryArray) -> TextColumn:
    _, offsets, data = texts.buffers()
    places = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return TextColumn(np.frombuffer(data or b"", np.uint8), places)


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
