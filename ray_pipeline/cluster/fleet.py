"""The generator's worker actors on Ray: started, told and heard, replaced when they hang, ended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from ray_pipeline.clock import Clock
from ray_pipeline.cluster.files import SharedFiles
from ray_pipeline.cluster.kept import Kept
from ray_pipeline.cluster.membership import Member, Owner
from ray_pipeline.config import Settings
from ray_pipeline.delivery.factory import fallback, open_delivery
from ray_pipeline.errors import StageFailedError
from ray_pipeline.generator.placement import Placement
from ray_pipeline.generator.runner import Assignment, ShardReport
from ray_pipeline.generator.worker import GeneratorWorker, Orders, WorkerReport

__all__ = ["ACTOR_CPUS", "Fleet"]

_log = logging.getLogger(__name__)

ACTOR_CPUS = 0.25
"""CPUs that Ray sets aside for a generator actor: at the default rate one uses far less."""
_ANSWER_S = 0.05
_SILENT_MS = 5_000
_HANGS_MS = 60_000
_LOST_MS = 120_000


class _WorkerActor(Member):
    """The remote end: a plain worker, built in the actor's own process."""

    def __init__(self, settings: Settings, owner: Owner, movies: Kept, files: SharedFiles) -> None:
        super().__init__(owner)
        settings = files.at_hand(settings)
        self._worker = GeneratorWorker(
            settings, movies.get(), lambda p: open_delivery(settings, owner.bootstrap, p), note=fallback(settings) or ""
        )
        self._node = str(ray.get_runtime_context().get_node_id())
        self._state = "starting"

    def exchange(self, orders: Orders, state: str) -> tuple[str, WorkerReport, dict[str, Any]]:
        self._state = state
        return self._node, self._worker.exchange(orders), self.standing()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "generator": {"state": self._state}}


@dataclass
class _Actor:
    """What the fleet knows of one actor; ``heard_ms`` is the time of its start until it is heard."""

    number: int
    handle: Any
    heard_ms: int
    pending: Any = None
    report: WorkerReport | None = None
    node: str = ""
    held: dict[str, Any] | None = None
    restarts: int = 0
    alive: bool = True
    replaced: bool = False


class Fleet:
    """Actors 0 … n - 1, each with the partitions that the placement gives it.

    An actor that died is started again by Ray. One that is silent is waited for, shown as not alive, and replaced after a
    minute: what it still does is fenced, so that no time limit can make a rating appear twice.

    Args:
        settings: all settings.
        owner: the pipeline that the actors belong to, with its brokers.
        movies: all movies.
        files: what the settings name, for the actors.
        placement: which actor has which partition.
        clock: tells the time.
        note: is called with a line when something noteworthy happens.
    """

    def __init__(
        self,
        settings: Settings,
        owner: Owner,
        movies: Kept,
        files: SharedFiles,
        placement: Placement,
        clock: Clock,
        note: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._owner = owner
        self._movies = movies
        self._files = files
        self._placement = placement
        self._clock = clock
        self._note = note
        self.stop_asked = False
        """Whether an actor was asked to have the pipeline stop."""
        self._noted: set[str] = set()
        self._actors: list[_Actor] = []
        self._started = 0

    def __len__(self) -> int:
        """How many actors there are."""
        return len(self._actors)

    @property
    def restarts(self) -> int:
        """How often an actor came back as a new process."""
        return sum(actor.restarts for actor in self._actors)

    @property
    def all_heard(self) -> bool:
        """Whether every actor has said something since it was started."""
        return all(actor.report is not None for actor in self._actors)

    def grow(self, actors: int) -> None:
        """Start actors until there are so many; does not wait for them."""
        remote = ray.remote(num_cpus=ACTOR_CPUS, max_restarts=-1, max_task_retries=0)(_WorkerActor)
        while len(self._actors) < actors:
            number = len(self._actors)
            name = self._owner.actor_name("generate", f"{number}-{self._clock.now_ms()}-{self._started}")
            self._started += 1
            place = remote.options(name=name, scheduling_strategy="SPREAD")
            handle = place.remote(self._settings, self._owner, self._movies, self._files)
            self._actors.append(_Actor(number, handle, self._clock.now_ms()))

    def shrink(self, actors: int) -> None:
        """End the last actors, at once, until so many are left."""
        while len(self._actors) > actors:
            ray.kill(self._actors.pop().handle)

    def exchange(
        self, news: dict[int, Assignment], stop: bool, leash_ms: int | None = None, state: str = ""
    ) -> list[ShardReport]:
        """Tell every actor what is wanted, and hear how its shards stand; waits a moment for the answers.

        Args:
            news: what is new for shards, by partition.
            stop: have all shards commit and end.
            leash_ms: nothing is sent that is due after this event time; None = as the event clock says.
            state: how the generator stands, for whoever asks an actor.

        Returns:
            What was heard of each shard from the actor that has it.

        Raises:
            StageFailedError: an actor died and Ray does not bring it back.
        """
        for actor in self._actors:
            if actor.pending is None:
                shards = {p: news.get(p) for p in self._placement.of(actor.number)}
                actor.pending = actor.handle.exchange.remote(Orders(shards, stop, leash_ms), state)
        pending = [actor.pending for actor in self._actors]
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=_ANSWER_S)
        reports: list[ShardReport] = []
        for actor in self._actors:
            if actor.pending in ready:
                reports += self._hear(actor)
            else:
                self._judge_silence(actor)
        for partition, number in self._placement.expire(self._clock.now_ms()).items():
            self._note(f"generator actor {number} does not let go of partition {partition}: it is taken from it")
        return reports

    def status(self) -> list[dict[str, Any]]:
        """The actors, for the record ``generator``."""
        return [
            {
                "actor": actor.number,
                "node": actor.node,
                "pid": actor.report.pid if actor.report else None,
                "partitions": self._placement.of(actor.number),
                "restarts": actor.restarts,
                "alive": actor.alive,
                "heard_ms": actor.heard_ms,
            }
            for actor in list(self._actors)
        ]

    def held(self) -> list[dict[str, Any]]:
        """What each actor that is alive said that it holds."""
        return [actor.held for actor in list(self._actors) if actor.alive and actor.held is not None]

    # -- inside

    def _hear(self, actor: _Actor) -> list[ShardReport]:
        reference, actor.pending = actor.pending, None
        try:
            node, report, standing = ray.get(reference)
        except RayActorError as error:
            self._note_death(actor, error)
            return []
        before = actor.report
        if before is not None and before.incarnation != report.incarnation:
            actor.restarts += 1
            self._note(f"generator actor {actor.number} is back (restart {actor.restarts})")
        elif not actor.alive:
            self._note(f"generator actor {actor.number} answers again")
        if before is not None and before.incarnation == report.incarnation:
            self._note_failures(before, report)
        actor.node, actor.report, actor.heard_ms = node, report, self._clock.now_ms()
        actor.alive, actor.replaced, actor.held = True, False, standing["held"]
        self.stop_asked = self.stop_asked or standing["stop_asked"]
        if report.note and report.note not in self._noted:  # what all say is told once
            self._noted.add(report.note)
            self._note(report.note)
        self._placement.heard(actor.number, {*report.leaving, *(shard.partition for shard in report.shards)})
        mine = self._placement.of(actor.number)
        return [shard for shard in report.shards if shard.partition in mine]

    def _note_failures(self, before: WorkerReport, now: WorkerReport) -> None:
        failures = {shard.partition: shard.failures for shard in before.shards}
        for shard in now.shards:
            if shard.failures > failures.get(shard.partition, 0):
                self._note(f"{shard.error}; shard {shard.partition} begins again from its last commit")

    def _note_death(self, actor: _Actor, error: RayActorError) -> None:
        _log.debug("actor %d: %s", actor.number, error)
        if actor.alive or actor.replaced:
            actor.alive, actor.replaced = False, False
            self._note(f"generator actor {actor.number} died; Ray starts it again")
        if self._clock.now_ms() - actor.heard_ms > _LOST_MS:
            raise StageFailedError(
                problem=f"generator actor {actor.number} does not come back", fix="See the Ray dashboard"
            ) from error

    def _judge_silence(self, actor: _Actor) -> None:
        silent_ms = self._clock.now_ms() - actor.heard_ms
        if actor.report is None or silent_ms < _SILENT_MS:
            return
        if actor.alive:
            actor.alive = False
            self._note(f"generator actor {actor.number} has said nothing for {silent_ms / 1000:.0f} s")
        if silent_ms >= _HANGS_MS and not actor.replaced:
            actor.replaced = True
            self._note(f"generator actor {actor.number} hangs: it is ended, and Ray starts it again")
            ray.kill(actor.handle, no_restart=False)
