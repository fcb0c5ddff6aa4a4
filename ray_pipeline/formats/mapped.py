"""Values with the fields of a layout, in one of several serialisations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray_pipeline.codec import encode_values, parse_json
from ray_pipeline.config import Settings
from ray_pipeline.events import EventBatch
from ray_pipeline.formats.fields import Layout, as_json
from ray_pipeline.formats.interface import CONTRACT, WireFormat

__all__ = ["MappedFormat", "Serde", "json_format"]


class Serde(Protocol):
    """Turns the fields of one value into bytes and back."""

    def serialize(self, fields: Mapping[str, Any]) -> bytes:
        """The same bytes for the same fields, always."""
        ...

    def deserialize(self, value: bytes) -> Any:
        """The fields, or whatever else is in the value.

        Raises:
            ValueError: it is of another serialisation.
        """
        ...


class MappedFormat:
    """See :class:`WireFormat`.

    Args:
        layout: names and padding.
        serde: the serialisation; what it raises besides is raised here.
    """

    def __init__(self, layout: Layout, serde: Serde) -> None:
        self._layout = layout
        self._serde = serde

    def to_wire(self, batch: EventBatch) -> Sequence[bytes]:
        """The contract's fields with other names, and what is added."""
        return [self._written(json.loads(value)) for value in encode_values(batch) if value is not None]

    def from_wire(self, values: list[bytes | None]) -> list[bytes | None]:
        """Values in the contract's form."""
        return [self._read(value) if value else value for value in values]

    def _written(self, rating: Mapping[str, Any]) -> bytes:
        return self._serde.serialize(self._layout.written(rating))

    def _read(self, value: bytes) -> bytes:
        try:
            rating = self._layout.read(self._serde.deserialize(value))
        except ValueError:
            return _of_another(value)
        return as_json(rating) if rating is not None and self._written(rating) == value else _of_another(value)


def _of_another(value: bytes) -> bytes:
    """The value; in the contract's own form with a space behind, lest it be taken for the rating that this format writes otherwise."""
    return value + b" " if value.startswith(b'{"userId":') else value


class _Json:
    def serialize(self, fields: Mapping[str, Any]) -> bytes:
        return as_json(fields)

    def deserialize(self, value: bytes) -> Any:
        return parse_json(value)


def json_format(settings: Settings) -> WireFormat:
    """Format ``json`` with the names and the padding of the settings."""
    return CONTRACT if settings.plain_format else MappedFormat(Layout.of(settings), _Json())
