"""The generator stage: worker actors on Ray, told and watched by a :class:`Coordinator`."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.config import Settings
from ray_pipeline.delivery.factory import open_delivery
from ray_pipeline.errors import RayPipelineError, StageFailedError
from ray_pipeline.generator.coordination import Coordinator, Totals
from ray_pipeline.generator.runner import Assignment
from ray_pipeline.generator.worker import GeneratorWorker, WorkerReport
from ray_pipeline.kafka.control import ControlFeed
from ray_pipeline.kafka.publish import Publisher
from ray_pipeline.model.catalogue import Catalogue, load_catalogue
from ray_pipeline.model.population import Movies, build_movies, build_user_map, movie_factors

__all__ = ["ACTOR_CPUS", "GeneratorStage", "build_shared_movies"]

_log = logging.getLogger(__name__)

ACTOR_CPUS = 0.25
"""CPUs that Ray sets aside for a generator actor: at the default rate one uses far less."""
_POLL_S = 0.2
_PUBLISH_S = 1.0
_MOVIES_PER_TASK = 1 << 17
_EVENTS_KEPT = 50
_LOST_AFTER_MS = 120_000


def _make_worker(settings: Settings, bootstrap: str, partitions: list[int], movies: Movies) -> GeneratorWorker:
    return GeneratorWorker(settings, partitions, movies, lambda p: open_delivery(settings, bootstrap, p))


class _WorkerActor:
    """The remote end: a plain worker, built in the actor's own process."""

    def __init__(self, settings: Settings, bootstrap: str, partitions: list[int], movies: Movies) -> None:
        self._worker = _make_worker(settings, bootstrap, partitions, movies)

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def report(self) -> WorkerReport:
        return self._worker.report()

    def begin(self, assignments: dict[int, Assignment]) -> None:
        self._worker.begin(assignments)

    def change_rate(self, epoch: Any) -> WorkerReport:
        return self._worker.change_rate(epoch)

    def end_at(self, ends: dict[int, int | None]) -> None:
        self._worker.end_at(ends)

    def stop(self) -> None:
        self._worker.stop()


@dataclass
class _Actor:
    """What the stage knows of one actor."""

    number: int
    partitions: list[int]
    handle: Any
    pending: Any = None
    report: WorkerReport | None = None
    heard_ms: int = 0
    node: str = ""
    restarts: int = 0
    alive: bool = True
    orders: list[Any] = field(default_factory=list)


def build_shared_movies(settings: Settings, catalogue: Catalogue) -> Any:
    """Build all movies, in parts side by side when they are many, and put them in the object store.

    Returns:
        Reference to a :class:`Movies`: one copy a node, read by every actor there without copying.
    """
    parts = math.ceil(len(catalogue) / _MOVIES_PER_TASK)
    if parts == 1:
        return ray.put(build_movies(settings, catalogue))
    build_part = ray.remote(num_cpus=ACTOR_CPUS)(movie_factors)
    build_all = ray.remote(num_cpus=ACTOR_CPUS)(lambda s, c, *made: build_movies(s, c, list(made)))
    refs = [build_part.remote(settings, ids) for ids in np.array_split(catalogue.movie_ids, parts)]
    return build_all.remote(settings, catalogue, *refs)


class GeneratorStage:
    """Starts the actors, tells them what to send, watches them, obeys the control topic.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT.
        clock: tells the time.
        on_event: is called with a line when something noteworthy happens.
    """

    def __init__(
        self,
        settings: Settings,
        bootstrap: str,
        clock: Clock | None = None,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._clock = clock or SystemClock()
        self._on_event = on_event or (lambda line: _log.info("%s", line))
        self._lock = threading.RLock()
        self._actors: list[_Actor] = []
        self._coordinator: Coordinator | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._state = "starting"
        self._started_ms = self._clock.now_ms()
        self._last_control = ""
        self._stopping = False
        self._may_begin = False
        self._error: Exception | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="generator-stage", daemon=True)

    # -- life

    def start(self) -> None:
        """Build the model and start the actors; returns as soon as they are started."""
        settings = self._settings
        catalogue = load_catalogue(settings)
        user_map = build_user_map(settings)
        shares = [user_map.share(p) for p in range(settings.partitions)]
        self._coordinator = Coordinator(settings, settings.digest(catalogue.digest), shares)
        self._catalogue_digest = catalogue.digest
        movies = build_shared_movies(settings, catalogue)
        remote = ray.remote(num_cpus=ACTOR_CPUS, max_restarts=-1, max_task_retries=0)(_WorkerActor)
        for number in range(settings.actors):
            partitions = list(range(number, settings.partitions, settings.actors))
            handle = remote.options(
                name=f"ray-pipeline-generator-{number}-{self._started_ms}", scheduling_strategy="SPREAD"
            ).remote(settings, self._bootstrap, partitions, movies)
            self._actors.append(_Actor(number, partitions, handle, heard_ms=self._clock.now_ms()))
        self._thread.start()

    def begin(self) -> None:
        """Let the shards send as soon as they are ready."""
        self._may_begin = True

    def wait_until_ready(self, deadline_s: float) -> None:
        """Block until every shard has its delivery open.

        Raises:
            StageFailedError: not within the deadline, or a shard failed.
        """
        self._wait(lambda: self.coordinator.ready, deadline_s)

    def wait_until_sending(self, deadline_s: float) -> None:
        """Block until the plan is made and every shard was told.

        Raises:
            StageFailedError: not within the deadline, or a shard failed.
            RayPipelineError: what a shard or the coordinator says.
        """
        self._wait(lambda: self.coordinator.started, deadline_s)

    def _wait(self, reached: Callable[[], bool], deadline_s: float) -> None:
        deadline_ms = self._clock.now_ms() + int(deadline_s * 1000)
        while not reached():
            self.check()
            if self._clock.now_ms() > deadline_ms:
                raise StageFailedError(
                    problem=f"the generator actors did not start within {deadline_s:.0f} s",
                    fix="See ray-pipeline doctor for CPUs, memory and the broker",
                )
            self._clock.wait(self._end, 0.05)

    def stop(self, deadline_s: float) -> bool:
        """Have every shard commit what it sent and end; end the actors.

        Returns:
            Whether all ended in order within ``deadline_s`` seconds.
        """
        with self._lock:
            self._stopping = True
            self._state = "stopping" if self._state != "failed" else self._state
            for actor in self._actors:
                actor.handle.stop.remote()
        deadline_ms = self._clock.now_ms() + int(deadline_s * 1000)
        while self._thread.is_alive() and not self.totals().finished and self._clock.now_ms() < deadline_ms:
            self._clock.wait(threading.Event(), 0.05)
        in_order = self.totals().finished
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join(max(1.0, deadline_s))
        self.kill()
        return in_order

    def kill(self) -> None:
        """End the actors at once, if they still run."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(15)
        for actor in self._actors:
            ray.kill(actor.handle)

    # -- asked and told

    @property
    def coordinator(self) -> Coordinator:
        """Plan and totals; exists from :meth:`start` on."""
        if self._coordinator is None:
            msg = "the stage was not started"
            raise RuntimeError(msg)
        return self._coordinator

    def totals(self) -> Totals:
        """The run so far."""
        with self._lock:
            return self.coordinator.totals()

    def check(self) -> None:
        """Raise what made the stage fail, if anything did."""
        if self._error is not None:
            raise self._error

    def set_rate(self, rate: float) -> None:
        """Change the target rate, ratings per second."""
        self._change(f"rate {rate:g}/s", rate=rate)

    def pause(self) -> None:
        """Send nothing until :meth:`resume`."""
        self._change("pause", paused=True)

    def resume(self) -> None:
        """Go on at the target rate."""
        self._change("resume", paused=False)

    def status(self) -> dict[str, Any]:
        """The record of topic ``ratings.progress``, key ``generator``."""
        with self._lock:
            now_ms = self._clock.now_ms()
            coordinator, totals = self.coordinator, self.coordinator.totals()
            return {
                "run": coordinator.run,
                "state": self._state,
                "target_rate": coordinator.rate,
                "plan_rate": coordinator.plan_rate(now_ms),
                "delivered": totals.delivered,
                "base": totals.base,
                "requested": coordinator.requested,
                "behind_s": round(totals.behind_s, 3),
                "started_ms": self._started_ms,
                "clock_offset_ms": coordinator.clock_offset_ms,
                "updated_ms": now_ms,
                "restarts": sum(actor.restarts for actor in self._actors) + totals.failures,
                "last_control": self._last_control,
                "actors": [
                    {
                        "actor": actor.number,
                        "node": actor.node,
                        "pid": actor.report.pid if actor.report else None,
                        "partitions": actor.partitions,
                        "restarts": actor.restarts,
                        "alive": actor.alive,
                    }
                    for actor in self._actors
                ],
                "events": list(self._events),
            }

    # -- the watching thread

    def _watch(self) -> None:
        control = ControlFeed(self._bootstrap, self._settings.control_topic)
        publisher = Publisher(self._bootstrap)
        published_ms = 0
        run_published = False
        try:
            while not self._end.is_set():
                for command in control.poll():
                    self._obey(command)
                self._poll_actors()
                now_ms = self._clock.now_ms()
                if self.coordinator.started and not run_published:
                    publisher.put(self._settings.progress_topic, "run", self._run_record())
                    run_published = True
                if now_ms - published_ms >= _PUBLISH_S * 1000:
                    publisher.put(self._settings.progress_topic, "generator", self.status())
                    published_ms = now_ms
                self._clock.wait(self._end, _POLL_S)
            if self._state != "failed":
                self._state = "stopped"
        except Exception as error:  # noqa: BLE001 - kept for check(), which raises it where it is waited for
            _log.error("generator: %s", error, exc_info=not isinstance(error, RayPipelineError))
            self._error = error
            self._state = "failed"
        finally:
            publisher.put(self._settings.progress_topic, "generator", self.status())
            publisher.close()
            control.close()

    def _run_record(self) -> dict[str, Any]:
        coordinator = self.coordinator
        return {
            "run": coordinator.run,
            "config": coordinator.config,
            "catalogue": self._catalogue_digest,
            "settings": self._settings.event_settings(),
            "start_ms": coordinator.start_ms,
            "topic": self._settings.ratings_topic,
        }

    def _poll_actors(self) -> None:
        for actor in self._actors:
            self._poll_actor(actor)
        with self._lock:
            coordinator = self.coordinator
            totals = coordinator.totals()
            if totals.failed and not self._stopping:
                raise StageFailedError(problem=totals.failed, fix="See the log of the generator actors")
            assignments = coordinator.assignments(self._clock.now_ms()) if self._may_begin else {}
            for actor in self._actors:
                mine = {p: assignments[p] for p in actor.partitions if p in assignments}
                if mine:
                    actor.handle.begin.remote(mine)
            if coordinator.started and self._state in ("starting", "running", "paused"):
                self._state = "paused" if coordinator.paused else "running"

    def _poll_actor(self, actor: _Actor) -> None:
        now_ms = self._clock.now_ms()
        if actor.pending is None:
            actor.pending = actor.handle.report.remote()
        ready, _ = ray.wait([actor.pending], timeout=0.05)
        if not ready:
            if now_ms - actor.heard_ms > _LOST_AFTER_MS:
                raise StageFailedError(
                    problem=f"generator actor {actor.number} has not answered for {_LOST_AFTER_MS // 1000} s",
                    fix="See ray-pipeline doctor for CPUs and memory of the Ray cluster",
                )
            return
        reference, actor.pending = actor.pending, None
        try:
            report: WorkerReport = ray.get(reference)
            if actor.report is None or actor.report.incarnation != report.incarnation:
                actor.node = ray.get(actor.handle.node.remote(), timeout=10)
        except RayActorError as error:
            if actor.alive:
                actor.alive = False
                self._note(f"generator actor {actor.number} died; Ray starts it again")
                _log.debug("actor %d: %s", actor.number, error)
            if now_ms - actor.heard_ms > _LOST_AFTER_MS:
                raise StageFailedError(
                    problem=f"generator actor {actor.number} does not come back", fix="See the Ray dashboard"
                ) from error
            return
        with self._lock:
            if actor.report is not None and actor.report.incarnation != report.incarnation:
                actor.restarts += 1
                self._note(f"generator actor {actor.number} is back (restart {actor.restarts})")
            actor.alive = True
            actor.report = report
            actor.heard_ms = now_ms
            self.coordinator.observe(list(report.shards))

    def _note(self, line: str) -> None:
        self._events.append({"at_ms": self._clock.now_ms(), "what": line})
        self._on_event(line)

    # -- control

    def _obey(self, command: dict[str, Any]) -> None:
        what = command.get("command")
        try:
            if what == "rate":
                self.set_rate(float(command["rate"]))
            elif what == "pause":
                self.pause()
            elif what == "resume":
                self.resume()
            elif what == "stop":
                self._note("stop was asked for")
                self._state = "stopping"
                for actor in self._actors:
                    actor.handle.stop.remote()
                self._stopping = True
            else:
                self._note(f"unknown control command refused: {json.dumps(command)[:200]}")
        except (RayPipelineError, KeyError, TypeError, ValueError) as error:
            self._note(f"control command refused: {error}")
        self._last_control = str(command.get("id", ""))

    def _change(self, what: str, *, rate: float | None = None, paused: bool | None = None) -> None:
        with self._lock:
            epoch = self.coordinator.change(self._clock.now_ms(), rate=rate, paused=paused)
            self._note(what)
            if epoch is None:
                return
            ends = self.coordinator.ends()
            for actor in self._actors:
                actor.handle.change_rate.remote(epoch)
                actor.handle.end_at.remote({p: ends[p] for p in actor.partitions})
