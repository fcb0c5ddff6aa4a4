"""Avro and Protobuf with Confluent's schema registry: a zero byte, the schema's id in four bytes, the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.error import SchemaRegistryError
from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer, ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext, SerializationError
from httpx2 import HTTPError

from ray_pipeline.errors import DeliveryError
from ray_pipeline.formats.fields import Layout
from ray_pipeline.formats.schema import REGISTRY_HEADER_BYTES, avro_schema, message_class

__all__ = ["RegistrySerde", "registry_serde"]

_ANY_RATING = {"userId": 1, "movieId": 1, "rating": 0.5, "timestamp": 1}


class RegistrySerde:
    """See :class:`~ray_pipeline.formats.mapped.Serde`: confluent-kafka's own, subject ``<topic>-value``.

    The first call registers the schema, and may block.

    Args:
        topic: the topic of the ratings.
        url: the schema registry.
        serialize: fields and context → a value.
        deserialize: a value and context → its fields.
        example: any fields; they are written when there is something to read before anything was written.

    Raises:
        DeliveryError: by any call: the registry does not answer, or refuses the schema.
    """

    def __init__(
        self,
        topic: str,
        url: str,
        serialize: Callable[[Any, SerializationContext], bytes],
        deserialize: Callable[[bytes, SerializationContext], Any],
        example: Mapping[str, Any],
    ) -> None:
        self._url = url
        self._context = SerializationContext(topic, MessageField.VALUE)
        self._serialize = serialize
        self._deserialize = deserialize
        self._example = example
        self._header: bytes | None = None

    def serialize(self, fields: Mapping[str, Any]) -> bytes:
        """A value."""
        try:
            value = self._serialize(fields, self._context)
        except (SchemaRegistryError, HTTPError) as error:
            raise self._registry_error(error) from error
        self._header = value[:REGISTRY_HEADER_BYTES]
        return value

    def deserialize(self, value: bytes) -> Any:
        """The fields.

        Raises:
            ValueError: it is of another schema, or broken.
        """
        if not value.startswith(self._header or self.serialize(self._example)[:REGISTRY_HEADER_BYTES]):
            raise ValueError("another schema")
        try:
            return self._deserialize(value, self._context)
        except (SchemaRegistryError, HTTPError) as error:
            raise self._registry_error(error) from error
        except (SerializationError, TypeError, EOFError, IndexError) as error:
            raise ValueError(str(error)) from error

    def _registry_error(self, error: Exception) -> DeliveryError:
        return DeliveryError(
            problem=f"the schema registry at {self._url} could not be used: {error}", fix="Check --schema-registry-url"
        )


def registry_serde(name: str, layout: Layout, topic: str, url: str) -> RegistrySerde:
    """The serde of a format.

    Args:
        name: ``avro`` or ``protobuf``.
        layout: names and padding.
        topic: the topic of the ratings.
        url: the schema registry.
    """
    client = SchemaRegistryClient.new_client({"url": url})
    serialize, deserialize = (_avro if name == "avro" else _protobuf)(layout, client)
    return RegistrySerde(topic, url, serialize, deserialize, layout.written(_ANY_RATING))


def _avro(layout: Layout, client: SchemaRegistryClient) -> tuple[Any, Any]:
    return AvroSerializer(client, avro_schema(layout)), AvroDeserializer(client)


def _protobuf(layout: Layout, client: SchemaRegistryClient) -> tuple[Any, Any]:
    message = message_class(layout)
    names = [field.name for field in message.DESCRIPTOR.fields]
    serialize = ProtobufSerializer(message, client)
    deserialize = ProtobufDeserializer(message, schema_registry_client=client)

    def fields_of(value: bytes, context: SerializationContext) -> dict[str, Any]:
        found = deserialize(value, context)
        return {name: getattr(found, name) for name in names}

    return lambda fields, context: serialize(message(**fields), context), fields_of
