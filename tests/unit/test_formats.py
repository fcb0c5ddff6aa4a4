"""Formats of a value: what is written, read back to the contract's form, and only where it is ours to the byte."""

from __future__ import annotations

import base64
import io
import json
import struct
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from httpx2 import ConnectError
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.codec import encode_values
from ray_pipeline.config import load_settings
from ray_pipeline.errors import ConfigurationError, DeliveryError
from ray_pipeline.events import EventBatch
from ray_pipeline.formats.columns import protobuf_columns
from ray_pipeline.formats.factory import open_format
from ray_pipeline.formats.fields import Layout
from ray_pipeline.formats.interface import CONTRACT, WireFormat
from ray_pipeline.formats.schema import avro_schema
from tests.unit.test_codec import ROWS, of_rows

AVRO = {"format": "avro", "schema_registry_url": "mock://formats"}
PROTOBUF = {"format": "protobuf", "schema_registry_url": "mock://formats-protobuf"}
WAYS: dict[str, dict[str, Any]] = {
    "renamed": {"field_names": "userId=user,movieId=item,rating=stars,timestamp=at"},
    "padded": {"padding_bytes": 100},
    "avro": AVRO,
    "avro, renamed and padded": {**AVRO, "field_names": "userId=user", "padding_bytes": 7},
    "protobuf": PROTOBUF,
    "protobuf, renamed and padded": {**PROTOBUF, "field_names": "userId=user", "padding_bytes": 7},
}
MOCK_REGISTRY = type(SchemaRegistryClient.new_client({"url": "mock://any"}))
FORMATS: dict[str, WireFormat] = {name: open_format(load_settings(**way)) for name, way in WAYS.items()}
RENAMED = Layout.of(load_settings(**WAYS["protobuf, renamed and padded"]))
ONE = EventBatch(0, 0, *(np.array([n]) for n in (116483, 24424)), np.array([6], np.uint8), np.array([1762796864000]))


def written(**way: Any) -> bytes:
    return open_format(load_settings(**way)).to_wire(ONE)[0]


def test_the_contract_is_the_default_and_costs_nothing() -> None:
    assert open_format(load_settings()) is CONTRACT
    values: list[bytes | None] = [b"anything", None]
    assert CONTRACT.from_wire(values) is values
    assert CONTRACT.to_wire(ONE) == encode_values(ONE)


@pytest.mark.parametrize("name", WAYS)
@given(rows=ROWS)
def test_what_is_written_is_read_back_in_the_contracts_form(name: str, rows: list[tuple[int, int, int, int]]) -> None:
    batch, wire = of_rows(rows), FORMATS[name]
    found = wire.to_wire(batch)
    assert wire.from_wire(list(found)) == encode_values(batch)
    assert not set(found) & set(encode_values(batch))
    for lo in range(len(rows)):
        assert wire.to_wire(batch.slice(lo, lo + 1))[0] == found[lo]


@pytest.mark.parametrize("name", WAYS)
@given(place=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_value_that_differs_in_a_byte_is_not_taken_for_the_one_it_was(name: str, place: int, byte: int) -> None:
    wire = FORMATS[name]
    value = bytearray(wire.to_wire(ONE)[0])
    value[place % len(value)] = byte
    found = wire.from_wire([bytes(value)])[0]
    if bytes(value) == wire.to_wire(ONE)[0]:
        assert found == encode_values(ONE)[0]
    else:
        assert found != encode_values(ONE)[0]


@pytest.mark.parametrize("name", WAYS)
def test_what_is_not_in_the_format_is_left_as_it_is(name: str) -> None:
    others: list[bytes | None] = [None, b"", b"nonsense", b"{}", b"\0\0\0\0\7", b"\0\0\0\0\1"]
    assert FORMATS[name].from_wire(others) == others


@pytest.mark.parametrize("name", WAYS)
def test_a_rating_in_the_contracts_form_is_not_taken_for_the_one_in_this_format(name: str) -> None:
    assert FORMATS[name].from_wire([*encode_values(ONE)]) == [encode_values(ONE)[0] + b" "]


@pytest.mark.parametrize("name", WAYS)
@given(kept=st.integers(0, 200), more=st.binary(max_size=30))
def test_no_bytes_of_others_break_the_reading(name: str, kept: int, more: bytes) -> None:
    mine = FORMATS[name].to_wire(ONE)[0]
    value = mine[:kept] + more
    assert (FORMATS[name].from_wire([value]) == encode_values(ONE)) == (value == mine)


def test_brackets_without_end_are_no_value() -> None:
    deep: list[bytes | None] = [b"[" * 100_000]
    assert FORMATS["renamed"].from_wire(deep) == deep


def test_fields_have_the_names_that_were_given_in_the_contracts_order() -> None:
    value = written(**WAYS["renamed"])
    assert value == b'{"user":116483,"item":24424,"stars":3.0,"at":1762796864000}'


def test_padding_has_its_length_and_differs_from_rating_to_rating() -> None:
    plain, value = json.loads(encode_values(ONE)[0]), json.loads(written(padding_bytes=100))
    assert len(value.pop("padding")) == 100 and value == plain
    many = of_rows([(n + 1, 5, 5, 1762796864000 + n) for n in range(300)])
    padding = {json.loads(value)["padding"] for value in FORMATS["padded"].to_wire(many)}
    assert len(padding) == 300


def test_avro_is_a_registrys_schema_and_a_record_of_it() -> None:
    value = written(**AVRO)
    assert value[:5] == b"\0\0\0\0\1"  # the first schema of a registry
    body, found = io.BytesIO(value[5:]), json.loads(avro_schema(Layout.of(load_settings(**AVRO))))
    assert fastavro.schemaless_reader(body, found, None) == json.loads(encode_values(ONE)[0])


def varint(number: int) -> bytes:
    return b"" if number == 0 else bytes([number & 0x7F | (0x80 if number > 0x7F else 0)]) + varint(number >> 7)


def test_protobuf_is_a_registrys_schema_and_the_fields_in_the_order_of_their_numbers() -> None:
    ids = b"\x08" + varint(116483) + b"\x10" + varint(24424)
    body = ids + b"\x19" + struct.pack("<d", 3.0) + b"\x20" + varint(1762796864000)
    assert written(**PROTOBUF) == b"\0\0\0\0\1\0" + body  # the registry's first schema, the schema's first message
    padded = written(**WAYS["protobuf, renamed and padded"])
    assert padded[5:-9] == b"\0" + body and padded[-9:-7] == b"\x2a\7"  # field 5, a text of seven bytes


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that whoever asks for a registry gets, as a real one is; each mock is a registry of its own."""
    one = SchemaRegistryClient.new_client({"url": "mock://one"})
    monkeypatch.setattr(SchemaRegistryClient, "new_client", lambda _: one)
    return one


def test_the_registry_has_protobufs_schema_with_the_names_that_were_given(registry: Any) -> None:
    written(**WAYS["protobuf, renamed and padded"])
    schema = registry.get_latest_version("ratings-value").schema
    assert schema.schema_type == "PROTOBUF"
    (message,) = FileDescriptorProto.FromString(base64.b64decode(schema.schema_str)).message_type
    assert [(field.number, field.name) for field in message.field] == [
        *((1, "user"), (2, "movieId"), (3, "rating"), (4, "timestamp"), (5, "padding"))
    ]


@given(rows=ROWS, foreign=st.binary(max_size=40))
def test_protobuf_is_read_as_columns_without_the_registry(
    rows: list[tuple[int, int, int, int]], foreign: bytes
) -> None:
    values = [*FORMATS["protobuf, renamed and padded"].to_wire(of_rows(rows)), None, b"", encode_values(ONE)[0]]
    wanted = [{"user": u, "movieId": m, "rating": half / 2, "timestamp": ms} for u, m, half, ms in rows]
    nothing = dict.fromkeys(("user", "movieId", "rating", "timestamp"))
    assert protobuf_columns(pa.array(values, pa.binary()), RENAMED).to_pylist() == [*wanted, *[nothing] * 3]
    assert len(protobuf_columns(pa.array([foreign, b"\0" * 6 + foreign]), RENAMED)) == 2


@pytest.mark.parametrize("way", [AVRO, PROTOBUF], ids=["avro", "protobuf"])
def test_a_value_of_another_schema_of_the_registry_is_none_of_ours(way: dict[str, Any], registry: Any) -> None:
    other, mine = written(**way, field_names="userId=user"), written(**way)
    assert other[:5] != mine[:5] and other[5:] == mine[5:]
    wire = open_format(load_settings(**way))
    assert wire.from_wire([other, mine]) == [other, *encode_values(ONE)]
    assert written(**way) == mine  # whoever comes later finds the schema


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"format": "avro"}, "format=avro needs schema_registry_url"),
        ({"format": "xml"}, "format"),
        ({"format": "avro", "schema_registry_url": "registry:8081"}, "schema_registry_url"),
        ({"format": "protobuf"}, "format=protobuf needs schema_registry_url"),
        ({**PROTOBUF, "fast": True}, "fast=True goes with the plain format alone"),
        ({**PROTOBUF, "malformed_share": 0.1}, "malformed_share breaks the contract's JSON"),
        ({**PROTOBUF, "sink": "ndjson", "output": "x", "ratings": 1}, "format=protobuf does not go with sink=ndjson"),
        ({**AVRO, "fast": True}, "fast=True goes with the plain format alone"),
        ({"padding_bytes": 5, "fast": True}, "fast=True goes with the plain format alone"),
        ({**AVRO, "tombstone_share": 0.1}, "tombstone_share breaks the contract's JSON"),
        ({**AVRO, "sink": "stdout"}, "format=avro does not go with sink=stdout"),
        ({"padding_bytes": 5, "sink": "parquet", "output": "x", "ratings": 1}, "do not go with sink=parquet"),
        ({"field_names": "user=userId"}, "'user' is none of userId"),
        ({"field_names": "userId=a b"}, "'a b' is no name"),
        ({"field_names": "userId=movieId"}, "two fields have one name"),
        ({"field_names": "userId=movie_id"}, "two fields have one name"),
        ({"field_names": "userId=Padding"}, "one is called padding"),
        ({"padding_bytes": -1}, "padding_bytes"),
    ],
)
def test_what_does_not_go_together_is_refused(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**flags)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["avro", "protobuf"])
def test_reading_a_run_without_its_registry_says_what_to_give(name: str) -> None:
    settings = load_settings().model_copy(update={"format": name})  # as a run published it
    with pytest.raises(ConfigurationError, match="--schema-registry-url"):
        open_format(settings)


@pytest.mark.parametrize("name", ["avro", "protobuf"])
def test_a_registry_that_does_not_answer_is_named_and_nothing_is_taken_for_foreign(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = {"format": name, "schema_registry_url": "mock://away"}
    value = FORMATS[name].to_wire(ONE)[0]

    def away(*_: Any, **__: Any) -> None:
        raise ConnectError("Connection refused")

    for ask in (lambda wire: wire.to_wire(ONE), lambda wire: wire.from_wire([value])):
        with monkeypatch.context() as patched:
            patched.setattr(MOCK_REGISTRY, "register_schema_full_response", away)
            with pytest.raises(DeliveryError, match="the schema registry at mock://away could not be used: Connection"):
                ask(open_format(load_settings(**way)))
    wire = open_format(load_settings(**way))
    wire.to_wire(ONE)
    monkeypatch.setattr(MOCK_REGISTRY, "get_schema", away)
    monkeypatch.setattr(MOCK_REGISTRY, "get_schema_by_guid", away)
    with pytest.raises(DeliveryError, match="mock://away"):
        wire.from_wire([value])
