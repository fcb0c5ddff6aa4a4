"""The schemas of a value: the four fields in the contract's order, then padding where there is some."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from ray_pipeline.formats.fields import PADDING, Layout

__all__ = ["REGISTRY_HEADER_BYTES", "avro_schema", "message_class"]

REGISTRY_HEADER_BYTES = 5
"""Zero and the schema's id, at the begin of a value whose schema is in a registry."""

_NAME, _NAMESPACE = "Rating", "ray_pipeline"
_AVRO = {"userId": "long", "movieId": "long", "rating": "double", "timestamp": "long"}  # by the contract's names
_PROTOBUF = {"long": FieldDescriptorProto.TYPE_INT64, "double": FieldDescriptorProto.TYPE_DOUBLE}


def avro_schema(layout: Layout) -> str:
    """Avro's, as JSON."""
    fields = [{"name": layout.names[name], "type": kind} for name, kind in _AVRO.items()]
    if layout.padding_bytes:
        fields.append({"name": PADDING, "type": "string"})
    return json.dumps({"type": "record", "name": _NAME, "namespace": _NAMESPACE, "fields": fields})


def message_class(layout: Layout) -> Any:
    """Protobuf's, as the class of its messages: proto3, fields numbered from 1, ``int64``, ``double`` and ``string``."""
    kinds = [(layout.names[name], _PROTOBUF[kind]) for name, kind in _AVRO.items()]
    if layout.padding_bytes:
        kinds.append((PADDING, FieldDescriptorProto.TYPE_STRING))
    file = FileDescriptorProto(name="rating.proto", package=_NAMESPACE, syntax="proto3")
    message = file.message_type.add(name=_NAME)
    for number, (name, kind) in enumerate(kinds, 1):
        message.field.add(name=name, number=number, type=kind, label=FieldDescriptorProto.LABEL_OPTIONAL)
    pool = DescriptorPool()  # of its own: another layout's message has the same name
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(f"{_NAMESPACE}.{_NAME}"))
