"""One generator process: some shards of the stream, each on a thread of its own."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import Epoch, ShardDelivery
from ray_pipeline.generator.runner import Assignment, ShardReport, ShardRunner
from ray_pipeline.model.population import Movies, build_user_map, build_users
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.restart import RestartPolicy

__all__ = ["GeneratorWorker", "WorkerReport"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker says of itself.

    Attributes:
        incarnation: changes whenever the process is a new one.
        pid: process id.
        shards: a report a shard.
    """

    incarnation: str
    pid: int
    shards: tuple[ShardReport, ...]


class GeneratorWorker:
    """Owns some partitions; holds the factors of their users. Becomes a Ray actor where it is started.

    Args:
        settings: all settings.
        partitions: the shards it owns.
        movies: all movies; one copy a node.
        open_delivery: makes a fresh delivery of a partition.
        clock: tells the time.
    """

    def __init__(
        self,
        settings: Settings,
        partitions: Sequence[int],
        movies: Movies,
        open_delivery: Callable[[int], ShardDelivery],
        clock: Clock | None = None,
    ) -> None:
        self._incarnation = uuid.uuid4().hex
        user_map = build_user_map(settings)
        self._runners = {
            partition: ShardRunner(
                ShardModel(settings, partition, build_users(settings, user_map.users_of(partition)), movies),
                partial(open_delivery, partition),
                settings.commit_interval_ms,
                clock or SystemClock(),
                RestartPolicy(),
            )
            for partition in partitions
        }
        for runner in self._runners.values():
            runner.start()

    def report(self) -> WorkerReport:
        """How the shards stand; returns at once."""
        shards = tuple(runner.report() for runner in self._runners.values())
        return WorkerReport(self._incarnation, os.getpid(), shards)

    def begin(self, assignments: dict[int, Assignment]) -> None:
        """Tell shards, by partition, what to do; returns at once."""
        for partition, assignment in assignments.items():
            self._runners[partition].begin(assignment)

    def change_rate(self, epoch: Epoch) -> WorkerReport:
        """Go on with another rate on every shard; the report has the plans as they took effect."""
        for runner in self._runners.values():
            runner.change_rate(epoch)
        return self.report()

    def end_at(self, ends: dict[int, int | None]) -> None:
        """Move the end of shards, by partition."""
        for partition, end_index in ends.items():
            self._runners[partition].end_at(end_index)

    def stop(self) -> None:
        """Have every shard commit and end; does not wait: see the reports."""
        for runner in self._runners.values():
            runner.stop()

    def join(self, timeout_s: float) -> bool:
        """Wait until every shard has ended; False when the time ran out."""
        return all(runner.join(timeout_s) for runner in self._runners.values())
