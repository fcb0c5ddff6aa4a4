"""Keys and values of ratings: as objects and as columns, the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.codec import (
    InvalidRating,
    TextColumn,
    decode_value,
    encode_columns,
    encode_keys,
    encode_values,
    parse_object,
)
from ray_pipeline.events import EventBatch

ROWS = st.lists(
    st.tuples(st.integers(1, 2**31 - 1), st.integers(1, 2**24), st.integers(1, 10), st.integers(1, 4_000_000_000_000)),
    max_size=20,
)


def of_rows(rows: list[tuple[int, int, int, int]]) -> EventBatch:
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    return EventBatch(0, 0, columns[0], columns[1], columns[2].astype(np.uint8), columns[3])


def texts(column: TextColumn) -> list[bytes]:
    return [column.data[a:b].tobytes() for a, b in zip(column.offsets[:-1], column.offsets[1:], strict=True)]


@given(ROWS)
def test_columns_hold_the_bytes_of_the_objects(rows: list[tuple[int, int, int, int]]) -> None:
    batch = of_rows(rows)
    keys, values = encode_columns(batch)
    assert texts(keys) == encode_keys(batch)
    assert texts(values) == encode_values(batch)
    assert len(keys) == len(values) == len(rows)


@given(ROWS, st.integers(0, 20), st.integers(0, 20))
def test_columns_of_a_slice(rows: list[tuple[int, int, int, int]], start: int, stop: int) -> None:
    batch = of_rows(rows)
    keys, values = encode_columns(batch.slice(start, stop))
    assert texts(keys) == encode_keys(batch)[start:stop]
    assert texts(values) == encode_values(batch)[start:stop]


@given(ROWS)
def test_what_is_encoded_decodes_to_itself(rows: list[tuple[int, int, int, int]]) -> None:
    decoded = [tuple(decode_value(value).values()) for value in encode_values(of_rows(rows))]
    assert decoded == [(user, movie, half / 2, ms) for user, movie, half, ms in rows]


@given(ROWS, st.integers(1, 4), st.integers(40, 60))
def test_ratings_of_one_millisecond_are_written_as_any_others(
    rows: list[tuple[int, int, int, int]], times: int, least: int
) -> None:
    many = [(*row[:3], row[3] + n % times) for n, row in enumerate(rows * least)]
    alone = [value for row in many for value in encode_values(of_rows([row]))]
    assert encode_values(of_rows(many)) == alone


@pytest.mark.parametrize("value", [None, b"", b"rubbish", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_others_wrote_is_no_rating_and_no_accident(value: bytes | None) -> None:
    assert parse_object(value) is None
    with pytest.raises(InvalidRating):
        decode_value(value)
