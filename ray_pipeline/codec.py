"""A rating as Kafka key and value, whole columns at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.events import EventBatch, Fault

__all__ = [
    "InvalidRating",
    "TextColumn",
    "check_fields",
    "decode_value",
    "encode_columns",
    "encode_keys",
    "encode_values",
    "number_in",
    "parse_json",
    "parse_object",
    "text_in",
    "whole_in",
]

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
        missing: shape (n,), where there is no text at all; None = nowhere.
    """

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int32]
    missing: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1


def encode_keys(batch: EventBatch) -> list[bytes]:
    """The key of each rating: the user id as a decimal string."""
    return _binary(_decimal(batch.user_ids)).to_pylist()  # type: ignore[no-any-return]


def encode_values(batch: EventBatch) -> list[bytes | None]:
    """The value of each rating, such as ``{"userId":116483,"movieId":24424,"rating":3.0,"timestamp":1762796864000}``.

    Broken where the batch says so; None = no value.
    """
    return _values(batch, _decimal(batch.user_ids)).to_pylist()  # type: ignore[no-any-return]


def encode_columns(batch: EventBatch) -> tuple[TextColumn, TextColumn]:
    """Keys and values as :func:`encode_keys` and :func:`encode_values` have them, without an object for each."""
    users = _decimal(batch.user_ids)
    return _column(_binary(users)), _column(_values(batch, users))


def _values(batch: EventBatch, users: pa.StringArray) -> pa.BinaryArray:
    ends = _ends(batch.half_stars, batch.timestamps_ms)
    joined = pc.binary_join_element_wise('{"userId":', users, ',"movieId":', _decimal(batch.movie_ids), *ends, "")
    return _binary(joined) if batch.faults is None else _broken(_binary(joined), batch)


def _broken(whole: pa.BinaryArray, batch: EventBatch) -> pa.BinaryArray:
    """The values, with those rewritten that are to be broken."""
    assert batch.faults is not None
    assert batch.details is not None
    rewritten = np.isin(batch.faults, list(_REWRITE))
    if not rewritten.any():
        return whole
    texts = [
        _REWRITE[fault](text, detail)
        for text, fault, detail in zip(
            whole.filter(pa.array(rewritten)).to_pylist(),
            batch.faults[rewritten].tolist(),
            batch.details[rewritten].tolist(),
            strict=True,
        )
    ]
    return pc.replace_with_mask(whole, pa.array(rewritten), pa.array(texts, pa.binary()))


def _cut_off(text: bytes, detail: int) -> bytes:
    return text[: 1 + detail % (len(text) - 1)]


def _without_a_field(text: bytes, detail: int) -> bytes:
    fields = text[1:-1].split(b",")
    del fields[detail % len(fields)]
    return b"{" + b",".join(fields) + b"}"


def _with_a_field(text: bytes, detail: int) -> bytes:
    return text[:-1] + b"," + _UNKNOWN[detail % len(_UNKNOWN)] + b"}"


def _out_of_range(text: bytes, detail: int) -> bytes:
    before, _, rest = text.partition(b'"rating":')
    return before + b'"rating":' + _OUT_OF_RANGE[detail % len(_OUT_OF_RANGE)] + rest[rest.index(b",") :]


_UNKNOWN = (b'"device":"tv"', b'"version":2', b'"tags":["new"]', b'"session":null')
_OUT_OF_RANGE = (b"0.0", b"5.5", b"-1.0", b"11.0", b"3.7")
_REWRITE: dict[int, Callable[[bytes, int], bytes | None]] = {
    Fault.UNKNOWN_FIELD: _with_a_field,
    Fault.MALFORMED: _cut_off,
    Fault.MISSING_FIELD: _without_a_field,
    Fault.OUT_OF_RANGE: _out_of_range,
    Fault.TOMBSTONE: lambda _text, _detail: None,
}


@cache
def _rating_texts() -> pa.StringArray:
    """Made when it is needed: Arrow loads pandas for its first array, a fifth of a second that most commands can do without."""
    return pa.array([f',"rating":{half / 2:.1f},"timestamp":' for half in range(11)])


def _ends(half_stars: npt.NDArray[np.uint8], times_ms: npt.NDArray[np.int64]) -> tuple[pa.StringArray | str, ...]:
    """What follows the movie, in one or several parts. Where many ratings share a millisecond each end is written once and picked."""
    ratings = _rating_texts()
    firsts = np.flatnonzero(np.diff(times_ms, prepend=-1))
    if len(firsts) * len(ratings) > len(times_ms):
        return ratings.take(pa.array(half_stars)), _decimal(times_ms), "}"
    per_time = np.repeat(np.arange(len(firsts)), len(ratings))
    ends = pc.binary_join_element_wise(
        ratings.take(pa.array(np.tile(np.arange(len(ratings)), len(firsts)))),
        _decimal(times_ms[firsts]).take(pa.array(per_time)),
        "}",
        "",
    )
    runs = np.repeat(np.arange(0, len(ends), len(ratings)), np.diff(firsts, append=len(times_ms)))
    return (ends.take(pa.array(runs + half_stars)),)


def _decimal(numbers: npt.NDArray[np.int64]) -> pa.StringArray:
    return pc.cast(pa.array(numbers), pa.string())


def _binary(texts: pa.StringArray) -> pa.BinaryArray:
    return pc.cast(texts, pa.binary())


def _column(texts: pa.BinaryArray) -> TextColumn:
    _, offsets, data = texts.buffers()
    places = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    missing = np.asarray(texts.is_null()) if texts.null_count else None
    return TextColumn(np.frombuffer(data or b"", np.uint8), places, missing)


def decode_value(value: bytes | None) -> dict[str, Any]:
    """A rating from a record's value, checked.

    Raises:
        InvalidRating: it is no JSON object, lacks a field, or a field is out of range.
    """
    try:
        fields = parse_json(value)
    except ValueError as error:
        raise InvalidRating("not JSON") from error
    return check_fields(fields)


def parse_json(value: bytes | None) -> Any:
    """What a record's value says, whoever wrote it.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(value or b"")
    except RecursionError as error:  # brackets in brackets in brackets
        raise ValueError(str(error)) from error


def parse_object(value: bytes | None) -> dict[str, Any] | None:
    """The JSON object that a record's value is; None when it is none."""
    try:
        found = parse_json(value)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def whole_in(fields: Mapping[str, Any], name: str, most: int = 2**53) -> int:
    """A whole number of a JSON object, whoever wrote it.

    Raises:
        ValueError: it is missing, or not a whole number of 0 … ``most``.
    """
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        msg = f"{name} is {_short(value)}, not a whole number of 0 … {most}"
        raise ValueError(msg)
    return value


def number_in(fields: Mapping[str, Any], name: str, most: float = 2.0**53) -> float:
    """A number of a JSON object, whoever wrote it.

    Raises:
        ValueError: it is missing, or not a number of 0 … ``most``.
    """
    value = fields.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
        msg = f"{name} is {_short(value)}, not a number of 0 … {most:g}"
        raise ValueError(msg)
    return float(value)


def text_in(fields: Mapping[str, Any], name: str) -> str:
    """A text of a JSON object, whoever wrote it.

    Raises:
        ValueError: it is missing, or not a text.
    """
    value = fields.get(name)
    if not isinstance(value, str):
        msg = f"{name} is {_short(value)}, not a text"
        raise ValueError(msg)
    return value


def _short(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]


def check_fields(fields: Any) -> dict[str, Any]:
    """The four fields of a rating, checked.

    Raises:
        InvalidRating: it is no JSON object, lacks a field, or a field is out of range.
    """
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
