"""What the text of a record is: a rating, one with more than that, or broken in one of the ways that settings declare."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ray_pipeline.codec import InvalidRating, decode_value
from ray_pipeline.events import Fault

__all__ = ["classify"]

_FIELDS = {"userId", "movieId", "rating", "timestamp"}


def classify(values: Iterable[bytes | None]) -> npt.NDArray[np.uint8]:
    """What the text of each record is, shape (n,): a :class:`Fault`, ``NONE`` or one of those of texts."""
    return np.array([_text_of(value) for value in values], np.uint8)


def _text_of(value: bytes | None) -> Fault:
    if value is None:
        return Fault.TOMBSTONE
    try:
        fields = json.loads(value)
    except ValueError:
        return Fault.MALFORMED
    if not isinstance(fields, dict):
        return Fault.MALFORMED
    if not fields.keys() >= _FIELDS:
        return Fault.MISSING_FIELD
    try:
        decode_value(value)
    except InvalidRating:
        return Fault.OUT_OF_RANGE
    return Fault.UNKNOWN_FIELD if fields.keys() > _FIELDS else Fault.NONE
