"""What was emitted, in columns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ray_pipeline.codec import encode_values
from ray_pipeline.conformance.texts import classify
from ray_pipeline.conformance.world import World
from ray_pipeline.events import EventBatch, Fault
from ray_pipeline.generator.plan import allocate
from ray_pipeline.generator.sequence import ShardSequence

__all__ = ["Sample", "regenerate"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Ratings under test; those of a partition in the order in which they lie there.

    Attributes:
        partition: shape (n,), int32.
        index: shape (n,), int64: which rating of its partition each is, 0 for the first.
        user_ids: shape (n,), int64.
        movie_ids: shape (n,), int64.
        half_stars: shape (n,), uint8, 1 … 10.
        timestamps_ms: shape (n,), int64, event time, epoch milliseconds.
        whole: whether the run ended by itself and these are all its ratings.
        source: the world that made them, as far as is known, to make more of them.
        unreadable: records beside them that are no rating.
        texts: shape (faults,), how many records have which text, by :class:`Fault`; those of texts count, and ``NONE``.
    """

    partition: npt.NDArray[np.int32]
    index: npt.NDArray[np.int64]
    user_ids: npt.NDArray[np.int64]
    movie_ids: npt.NDArray[np.int64]
    half_stars: npt.NDArray[np.uint8]
    timestamps_ms: npt.NDArray[np.int64]
    whole: bool
    source: World
    unreadable: int = 0
    texts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(Fault), np.int64))

    def __len__(self) -> int:
        return len(self.user_ids)

    @classmethod
    def of(cls, batches: list[EventBatch], whole: bool, source: World) -> Sample:
        """From runs of consecutive ratings, as their records can be read."""
        texts = [_texts(batch) for batch in batches]
        readable = [t < Fault.MALFORMED for t in texts]
        rows = list(zip(batches, readable, strict=True))
        return cls(
            np.concatenate([np.full(int(r.sum()), b.partition, np.int32) for b, r in rows]),
            np.concatenate([np.arange(b.first_index, b.next_index, dtype=np.int64)[r] for b, r in rows]),
            np.concatenate([b.user_ids[r] for b, r in rows]),
            np.concatenate([b.movie_ids[r] for b, r in rows]),
            np.concatenate([b.half_stars[r] for b, r in rows]),
            np.concatenate([b.timestamps_ms[r] for b, r in rows]),
            whole,
            source,
            unreadable=sum(int((~r).sum()) for r in readable),
            texts=np.bincount(np.concatenate(texts), minlength=len(Fault)),
        )

    def where(self, chosen: npt.NDArray[np.bool_]) -> Sample:
        """Some of the ratings, by a mask of shape (n,)."""
        names = ("partition", "index", "user_ids", "movie_ids", "half_stars", "timestamps_ms")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})


def _texts(batch: EventBatch) -> npt.NDArray[np.uint8]:
    """What the text of each record is; where nothing is broken on purpose, none is looked at."""
    return np.zeros(len(batch), np.uint8) if batch.faults is None else classify(encode_values(batch))


def regenerate(world: World, events: int | None, most: int) -> Sample:
    """The first ratings of a run, made without sending any.

    Args:
        world: what makes them.
        events: how many; None = as many as the settings name, else ``most``.
        most: no more than these.
    """
    declared = world.declared_total
    total = events if events is not None else min(declared or most, most)
    schedules = [world.schedules[p] for p in range(world.settings.partitions)]
    ever = world.plan.total()
    if np.isfinite(ever):  # a plan that ends makes no more
        total = min(total, sum(s.arrivals.count_upto(ever * s.share) for s in schedules))
    batches = []
    for partition, end in enumerate(allocate(schedules, [0] * len(schedules), total)):
        batches.append(ShardSequence(world.shard(partition), schedules[partition], 0).events(0, end))
    return Sample.of(batches, whole=total == declared, source=world)
