"""What a task of the Spark job does: the same pure functions as the generator's actors, on an executor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.history.ranges import ShardRange
from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.model.population import Movies, build_movies, build_user_map
from ray_pipeline.model.ratings import ShardModel

__all__ = ["COLUMNS", "ModelSource", "ratings"]

COLUMNS = "partition int, index bigint, user_id bigint, movie_id bigint, rating double, timestamp bigint"
"""Of a row of history. ``rating`` in stars, ``timestamp`` = event time, epoch milliseconds UTC."""
_AT_ONCE = 1 << 16

_movies: dict[str, Movies] = {}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Makes the models of shards wherever it is sent; movies are made once a process.

    Attributes:
        settings: the event settings are used.
        catalogue: the movies; sent along, since an executor's machine may not have the file.
    """

    settings: Settings
    catalogue: Catalogue

    def model(self, partition: int) -> ShardModel:
        """What draws the ratings of a shard."""
        name = self.settings.digest(self.catalogue.digest)
        if name not in _movies:
            _movies.clear()  # of another stream
            _movies[name] = build_movies(self.settings, self.catalogue)
        return ShardModel.of_shard(self.settings, partition, build_user_map(self.settings), _movies[name])


def ratings(
    source: ModelSource, lived: dict[int, ShardProgress], ranges: Sequence[ShardRange]
) -> Iterator[pa.RecordBatch]:
    """Rows of history, see :data:`COLUMNS`.

    Args:
        source: makes the models.
        lived: progress of each shard, which has the plan.
        ranges: which ratings, in order.
    """
    for piece in ranges:
        sequence = ShardSequence.of(source.model(piece.partition), lived[piece.partition])
        for first in range(piece.first, piece.stop, _AT_ONCE):
            yield _rows(sequence.events(first, min(_AT_ONCE, piece.stop - first)))


def _rows(events: EventBatch) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [
            pa.repeat(pa.scalar(events.partition, pa.int32()), len(events)),
            pa.array(range(events.first_index, events.next_index), pa.int64()),
            pa.array(events.user_ids),
            pa.array(events.movie_ids),
            pa.array(events.half_stars / 2.0),
            pa.array(events.timestamps_ms),
        ],
        names=[column.split()[0] for column in COLUMNS.split(", ")],
    )
