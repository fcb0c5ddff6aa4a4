"""JSON with other field names, or padding."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ray_pipeline.codec import encode_values
from ray_pipeline.config import Settings
from ray_pipeline.events import EventBatch
from ray_pipeline.formats.fields import Layout, as_json
from ray_pipeline.formats.interface import CONTRACT, WireFormat

__all__ = ["MappedJson", "json_format"]


class MappedJson:
    """See :class:`WireFormat`.

    Args:
        layout: names and padding.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def to_wire(self, batch: EventBatch) -> Sequence[bytes]:
        """The contract's form with other names, and what is added."""
        return [self._written(value) for value in encode_values(batch) if value is not None]

    def from_wire(self, values: list[bytes | None]) -> list[bytes | None]:
        """Values in the contract's form."""
        return [self._read(value) for value in values]

    def _written(self, value: bytes) -> bytes:
        return as_json(self._layout.written(json.loads(value)))

    def _read(self, value: bytes | None) -> bytes | None:
        try:
            rating = self._layout.read(json.loads(value or b""))
            found = None if rating is None else as_json(rating)
            return found if found is not None and self._written(found) == value else value
        except (ValueError, TypeError):
            return value


def json_format(settings: Settings) -> WireFormat:
    """Format ``json`` with the names and the padding of the settings."""
    return CONTRACT if settings.plain_format else MappedJson(Layout.of(settings))
