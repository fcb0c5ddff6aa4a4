"""Avro with Confluent's schema registry: a zero byte, the schema's id in four bytes, the record."""

from __future__ import annotations

import json
from collections.abc import Sequence

from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.error import SchemaRegistryError
from confluent_kafka.serialization import MessageField, SerializationContext, SerializationError
from httpx2 import HTTPError

from ray_pipeline.codec import encode_values
from ray_pipeline.errors import DeliveryError
from ray_pipeline.events import EventBatch
from ray_pipeline.formats.fields import Layout, as_json
from ray_pipeline.formats.schema import avro_schema

__all__ = ["RegistryAvro"]

_NO_SUCH_SCHEMA = 404


class RegistryAvro:
    """See :class:`WireFormat`: confluent-kafka's own serialiser, subject ``<topic>-value``.

    Args:
        layout: names and padding.
        topic: the topic of the ratings.
        registry_url: the schema registry.
    """

    def __init__(self, layout: Layout, topic: str, registry_url: str) -> None:
        self._layout = layout
        self._url = registry_url
        self._context = SerializationContext(topic, MessageField.VALUE)
        client = SchemaRegistryClient.new_client({"url": registry_url})
        self._serialize = AvroSerializer(client, avro_schema(layout))
        self._deserialize = AvroDeserializer(client)
        self._registered = False

    def to_wire(self, batch: EventBatch) -> Sequence[bytes]:
        """Avro records; the first call registers the schema, and may block.

        Raises:
            DeliveryError: the registry does not answer, or refuses the schema.
        """
        return [self._written(value) for value in encode_values(batch) if value is not None]

    def from_wire(self, values: list[bytes | None]) -> list[bytes | None]:
        """Values in the contract's form; the first call registers the schema.

        Raises:
            DeliveryError: the registry does not answer.
        """
        return [self._read(value) for value in values]

    def _written(self, value: bytes) -> bytes:
        try:
            found: bytes = self._serialize(self._layout.written(json.loads(value)), self._context)
        except (SchemaRegistryError, HTTPError) as error:
            raise _registry_error(self._url, error) from error
        self._registered = True
        return found

    def _read(self, value: bytes | None) -> bytes | None:
        if not value or value[0] != 0:
            return value
        if not self._registered:
            self._written(as_json({"userId": 1, "movieId": 1, "rating": 0.5, "timestamp": 1}))
        try:
            rating = self._layout.read(self._deserialize(value, self._context))
            found = None if rating is None else as_json(rating)
            return found if found is not None and self._written(found) == value else value
        except HTTPError as error:
            raise _registry_error(self._url, error) from error
        except SchemaRegistryError as error:
            if error.http_status_code != _NO_SUCH_SCHEMA:
                raise _registry_error(self._url, error) from error
            return value
        except (SerializationError, ValueError, TypeError, EOFError, IndexError):
            return value  # no Avro, or not of this schema


def _registry_error(url: str, error: Exception) -> DeliveryError:
    return DeliveryError(
        problem=f"the schema registry at {url} could not be used: {error}", fix="Check --schema-registry-url"
    )
