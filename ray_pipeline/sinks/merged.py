"""All shards of a run as one stream, in the order in which their ratings are due. Pure: the same ratings as the actors send."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.arrivals import poisson_arrivals
from ray_pipeline.generator.coordination import Coordinator
from ray_pipeline.generator.plan import NEVER_MS, RatePlan, ShardSchedule
from ray_pipeline.generator.runner import RunnerState, ShardReport
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_movies, build_user_map
from ray_pipeline.model.ratings import ShardModel

__all__ = ["MergedStream", "Piece", "untouched"]

_AT_ONCE = 1 << 17


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the stream.

    Attributes:
        batches: the ratings of each shard that has some in it, by partition.
        order: shape (n,), int64: positions in the batches laid one after another, in the stream's order: by the time at which
            they are due, then partition, then index.
    """

    batches: tuple[EventBatch, ...]
    order: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.order)


@dataclass
class _Shard:
    sequence: ShardSequence
    next_index: int
    end_index: int | None
    at_once: int

    def next_due_ms(self, ahead: int = 0) -> int:
        index = self.next_index + ahead
        if self.end_index is not None:
            index = min(index, self.end_index - 1)
        over = self.end_index is not None and self.next_index >= self.end_index
        return NEVER_MS if over else int(self.sequence.schedule.due_ms(index, 1)[0])

    def due_until(self, until_ms: int) -> int:
        """How many of the next ratings are due at an event time or before."""
        most = NEVER_MS if self.end_index is None else self.end_index
        until = int(self.sequence.schedule.count_before(np.array([until_ms + 1], np.int64), most)[0])
        return max(0, until - self.next_index)


class MergedStream:
    """The ratings of a run that begins now, or at the start time that is set, from the first one on.

    What each shard sends is decided by the generator's own coordinator, as for actors.

    Args:
        settings: all settings.
        clock: tells the time.

    Attributes:
        requested: how many ratings there are; None = without end.
        event_now_ms: gives the event time that belongs to a wall-clock time, both epoch milliseconds.

    Raises:
        ConfigurationError: a partition has no users.
    """

    def __init__(self, settings: Settings, clock: Clock) -> None:
        catalogue, user_map = load_catalogue(settings), build_user_map(settings)
        shares = [user_map.share(p) for p in range(settings.partitions)]
        coordinator = Coordinator(settings, settings.digest(catalogue.digest), shares)
        movies = build_movies(settings, catalogue)
        models = [ShardModel.of_shard(settings, p, user_map, movies) for p in range(settings.partitions)]
        coordinator.observe([untouched(p) for p in range(settings.partitions)])
        told = coordinator.assignments(clock.now_ms())  # the run begins here: all that takes time is done
        self.requested = coordinator.requested
        self.event_now_ms = coordinator.event_now_ms
        self._shards = []
        for model in models:
            orders = told[model.partition]
            poisson = poisson_arrivals(orders.poisson_seed, model.partition)
            schedule = ShardSchedule(RatePlan(orders.epochs), orders.share, orders.phase, poisson)
            at_once = math.ceil(_AT_ONCE * orders.share)
            self._shards.append(_Shard(ShardSequence(model, schedule, 0), 0, orders.end_index, at_once))

    def next_due_ms(self) -> int:
        """Event time of the next rating, epoch milliseconds; :data:`NEVER_MS` at the end."""
        return min(shard.next_due_ms() for shard in self._shards)

    def take(self, until_ms: int | None = None) -> Piece:
        """The next ratings, some 100,000 at most; none at the end.

        Args:
            until_ms: only those that are due at this event time or before; None = whatever comes next.
        """
        horizon_ms = min(shard.next_due_ms(shard.at_once - 1) for shard in self._shards)
        if horizon_ms >= NEVER_MS and self.next_due_ms() < NEVER_MS:
            if self.requested is None:  # the plan ends, and so does the stream
                horizon_ms = NEVER_MS - 2
            else:
                raise ConfigurationError(
                    problem="the rate plan ends before the ratings that were asked for",
                    fix="Lower ratings, or raise the rate",
                )
        if horizon_ms >= NEVER_MS:
            return Piece((), np.empty(0, np.int64))
        if until_ms is not None:
            horizon_ms = min(horizon_ms, until_ms)
        batches, due = [], []
        for shard in self._shards:
            count = shard.due_until(horizon_ms)
            if count:
                batches.append(shard.sequence.events(shard.next_index, count))
                due.append(shard.sequence.schedule.due_ms(shard.next_index, count))
                shard.next_index += count
        order = np.argsort(np.concatenate(due), kind="stable") if due else np.empty(0, np.int64)
        return Piece(tuple(batches), order)


def untouched(partition: int) -> ShardReport:
    """What a shard reports whose partition is empty."""
    return ShardReport(partition, RunnerState.READY, 0, 0, None, 0.0, 0, "")
