"""The fields of a value: their names, and padding."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_pipeline.config import FIELDS, Settings, parse_field_names

__all__ = ["PADDING", "Layout"]

PADDING = "padding"
_TEXT_BYTES = 1 << 16


@dataclass(frozen=True)
class Layout:
    """Which fields a value has.

    Attributes:
        names: the name of each of the four fields, by the contract's.
        padding_bytes: length of an additional field ``padding``; 0 = there is none.
    """

    names: Mapping[str, str]
    padding_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> Layout:
        """As the settings have it."""
        renamed = parse_field_names(settings.field_names)
        return cls({name: renamed.get(name, name) for name in FIELDS}, settings.padding_bytes)

    def written(self, rating: Mapping[str, Any]) -> dict[str, Any]:
        """A rating's fields → those of its value."""
        found = {self.names[name]: rating[name] for name in FIELDS}
        return {**found, PADDING: self.padding(rating)} if self.padding_bytes else found

    def read(self, fields: Any) -> dict[str, Any] | None:
        """The fields of a value → those of its rating; None when they are not just these, or an id or time is no whole number."""
        if not isinstance(fields, Mapping):
            return None
        if set(fields) != {*self.names.values(), *([PADDING] if self.padding_bytes else [])}:
            return None
        rating = {name: fields[self.names[name]] for name in FIELDS}
        return rating if all(isinstance(rating[name], int) for name in FIELDS if name != "rating") else None

    def padding(self, rating: Mapping[str, Any]) -> str:
        """Text that does not compress to nothing: a piece of a fixed one, from a place that follows from the rating."""
        start = (rating["userId"] * 31 + rating["movieId"] * 17 + rating["timestamp"]) % _TEXT_BYTES
        text = _text(self.padding_bytes)
        return text[start : start + self.padding_bytes]


@functools.cache
def _text(reach: int) -> str:
    """Hexadecimal digits, at least ``_TEXT_BYTES`` and ``reach`` more; the same on every machine."""
    blocks = -(-(_TEXT_BYTES + reach) // 64)
    return "".join(hashlib.sha256(b"%d" % n).hexdigest() for n in range(blocks))


def as_json(fields: Mapping[str, Any]) -> bytes:
    """A value in JSON as the contract writes it, without spaces."""
    return json.dumps(fields, separators=(",", ":")).encode()
