"""The Avro schema of a value."""

from __future__ import annotations

import json

from ray_pipeline.formats.fields import PADDING, Layout

__all__ = ["avro_schema"]

_TYPES = {"userId": "long", "movieId": "long", "rating": "double", "timestamp": "long"}


def avro_schema(layout: Layout) -> str:
    """The schema as JSON: the four fields in the contract's order, then padding where there is some."""
    fields = [{"name": layout.names[name], "type": kind} for name, kind in _TYPES.items()]
    if layout.padding_bytes:
        fields.append({"name": PADDING, "type": "string"})
    return json.dumps({"type": "record", "name": "Rating", "namespace": "ray_pipeline", "fields": fields})
