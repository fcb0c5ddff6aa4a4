"""One generator process: some shards of the stream, each on a thread of its own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardDelivery
from ray_pipeline.generator.runner import Assignment, ShardReport, ShardRunner
from ray_pipeline.model.population import Movies, build_user_map
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.restart import RestartPolicy

__all__ = ["GeneratorWorker", "Orders", "WorkerReport"]


@dataclass(frozen=True, slots=True)
class Orders:
    """What a worker is told, again and again: all of it, so that one that was lost loses nothing.

    Attributes:
        shards: the partitions that it has, each with what is new for it; None = nothing is. It lets go of all others.
        stop: have every shard commit and end.
        leash_ms: nothing is sent that is due after this event time; None = as the event clock says.
    """

    shards: dict[int, Assignment | None] = field(default_factory=dict)
    stop: bool = False
    leash_ms: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker says of itself.

    Attributes:
        incarnation: changes whenever the process is a new one.
        pid: process id.
        shards: a report a shard that it has.
        leaving: the partitions that it has not let go of yet.
        note: what the process could not do as it was asked to; empty when there is nothing to say.
    """

    incarnation: str
    pid: int
    shards: tuple[ShardReport, ...]
    leaving: tuple[int, ...]
    note: str = ""


class GeneratorWorker:
    """Has the partitions that it is told to have; holds the factors of their users. Becomes a Ray actor where it is started.

    Args:
        settings: all settings.
        movies: all movies; one copy a node.
        open_delivery: makes a fresh delivery of a partition.
        clock: tells the time.
        note: goes into each report.
    """

    def __init__(
        self,
        settings: Settings,
        movies: Movies,
        open_delivery: Callable[[int], ShardDelivery],
        clock: Clock | None = None,
        note: str = "",
    ) -> None:
        self._note = note
        self._incarnation = uuid.uuid4().hex
        self._settings = settings
        self._movies = movies
        self._open_delivery = open_delivery
        self._clock = clock or SystemClock()
        self._user_map = build_user_map(settings)
        self._runners: dict[int, ShardRunner] = {}
        self._leaving: dict[int, ShardRunner] = {}

    def exchange(self, orders: Orders) -> WorkerReport:
        """Obey, and say how the shards stand; returns at once."""
        for partition in self._runners.keys() - orders.shards.keys():
            self._leaving[partition] = self._runners.pop(partition)
            self._leaving[partition].stop()
        self._leaving = {p: runner for p, runner in self._leaving.items() if not runner.join(0)}
        for partition, assignment in orders.shards.items():
            if partition in self._leaving:
                continue  # comes back before it is gone: begins anew when it is
            if partition not in self._runners:
                self._runners[partition] = self._start(partition)
            self._runners[partition].tell(assignment, orders.leash_ms)
            if orders.stop:
                self._runners[partition].stop()
        shards = tuple(runner.report() for runner in self._runners.values())
        return WorkerReport(self._incarnation, os.getpid(), shards, tuple(self._leaving), self._note)

    def _start(self, partition: int) -> ShardRunner:
        runner = ShardRunner(
            partition,
            lambda: self._make_model(partition),
            partial(self._open_delivery, partition),
            self._settings.commit_interval_ms,
            self._clock,
            RestartPolicy(),
        )
        runner.start()
        return runner

    def _make_model(self, partition: int) -> ShardModel:
        return ShardModel.of_shard(self._settings, partition, self._user_map, self._movies)
