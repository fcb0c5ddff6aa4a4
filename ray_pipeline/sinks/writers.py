"""What is written of a piece of the stream: lines of JSON, or columns."""

from __future__ import annotations

from itertools import chain
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_pipeline.formats.interface import WireFormat
from ray_pipeline.sinks.merged import Piece

__all__ = ["SCHEMA", "LineWriter", "ParquetWriter", "PieceWriter"]

SCHEMA = pa.schema(
    [
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("movie_id", pa.int64(), nullable=False),
        pa.field("rating", pa.float64(), nullable=False),
        pa.field("timestamp", pa.timestamp("ms", "UTC"), nullable=False),
    ]
)
"""Columns of a Parquet file: where a rating stands in the stream, and its four fields."""


class PieceWriter(Protocol):
    """Writes a stream piece by piece. One owner, one thread."""

    def write(self, piece: Piece) -> None:
        """Write a piece. May block.

        Raises:
            OSError: it could not be written.
        """
        ...

    def close(self) -> None:
        """Write what belongs to the end; the stream beneath stays open."""
        ...


class LineWriter:
    """A line a rating: the value that Kafka gets, byte for byte; an empty line where that has no value.

    Args:
        stream: where to write.
        wire: how values are written.
    """

    def __init__(self, stream: BinaryIO, wire: WireFormat) -> None:
        self._stream = stream
        self._wire = wire

    def write(self, piece: Piece) -> None:
        """Write a piece, and hand it over at once."""
        values = list(chain.from_iterable(self._wire.to_wire(batch) for batch in piece.batches))
        self._stream.write(b"".join([(values[at] or b"") + b"\n" for at in piece.order.tolist()]))
        self._stream.flush()

    def close(self) -> None:
        """Nothing is held."""


class ParquetWriter:
    """Columns of :data:`SCHEMA`, zstd; a row group a piece.

    Args:
        stream: where to write.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._writer = pq.ParquetWriter(stream, SCHEMA, compression="zstd")

    def write(self, piece: Piece) -> None:
        """Write a row group."""
        batches = piece.batches

        def column(parts: list[Any], kind: type[np.generic]) -> pa.Array:
            return pa.array(np.concatenate(parts)[piece.order].astype(kind, copy=False))

        columns = [
            column([np.full(len(b), b.partition) for b in batches], np.int32),
            column([np.arange(b.first_index, b.next_index) for b in batches], np.int64),
            column([b.user_ids for b in batches], np.int64),
            column([b.movie_ids for b in batches], np.int64),
            column([b.half_stars / 2 for b in batches], np.float64),
            column([b.timestamps_ms for b in batches], np.int64).cast(SCHEMA.field("timestamp").type),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()
