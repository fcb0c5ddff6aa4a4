"""The generator stage: worker actors on Ray, told and watched by a :class:`Coordinator`."""

from __future__ import annotations

import json
import logging
import math
import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.cluster.files import SharedFiles
from ray_pipeline.cluster.fleet import ACTOR_CPUS, Fleet
from ray_pipeline.cluster.kept import Kept
from ray_pipeline.cluster.lending import Lending
from ray_pipeline.cluster.membership import Owner
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError, EnvironmentProblem, RayPipelineError, StageFailedError
from ray_pipeline.generator.coordination import Coordinator, Totals
from ray_pipeline.generator.placement import Placement
from ray_pipeline.generator.runner import Assignment
from ray_pipeline.kafka.control import ControlFeed
from ray_pipeline.kafka.publish import Publisher
from ray_pipeline.model.catalogue import Catalogue, load_catalogue
from ray_pipeline.model.population import build_movies, build_user_map, movie_factors

__all__ = ["GeneratorStage", "build_shared_movies"]

_log = logging.getLogger(__name__)

_POLL_S = 0.2
_HURRY_S = 0.02
_PUBLISH_MS = 1_000
_MOVIES_PER_TASK = 1 << 17
_EVENTS_KEPT = 50
_ANSWERS_KEPT = 20
_EPOCHS_TOLD = 20
_ROOM_MS = 3_000  # Ray tells of CPUs that were let go with some delay
_NEW_ACTORS_MS = 90_000


@dataclass
class _Scaling:
    """A change of the number of actors that is under way: new actors start, then partitions pass to them."""

    identity: str
    actors: int
    before: int
    since_ms: int
    starting: bool = False
    passing: bool = False


def build_shared_movies(settings: Settings, catalogue: Catalogue) -> Kept:
    """Build all movies, in parts side by side when they are many, and put them in the object store.

    Returns:
        A :class:`Movies`.
    """
    parts = math.ceil(len(catalogue) / _MOVIES_PER_TASK)
    if parts == 1 or settings.model is not None:
        return Kept.put(build_movies(settings, catalogue))
    build_part = ray.remote(num_cpus=ACTOR_CPUS)(movie_factors)
    build_all = ray.remote(num_cpus=ACTOR_CPUS)(lambda s, c, *made: build_movies(s, c, list(made)))
    refs = [build_part.remote(settings, ids) for ids in np.array_split(catalogue.movie_ids, parts)]
    return Kept(build_all.remote(settings, catalogue, *refs))


class GeneratorStage:
    """Starts the actors, tells them what to send, watches them, obeys the control topic.

    Args:
        settings: all settings.
        owner: the pipeline that this is the generator of, with its brokers.
        files: what the settings name, for the actors.
        clock: tells the time.
        on_event: is called with a line when something noteworthy happens.
        leash_s: how far a shard may be ahead of the slowest one while the past is made, seconds of event time; None = however far.
    """

    def __init__(
        self,
        settings: Settings,
        owner: Owner,
        files: SharedFiles,
        clock: Clock | None = None,
        on_event: Callable[[str], None] | None = None,
        leash_s: float | None = None,
    ) -> None:
        self._settings = settings
        self._owner = owner
        self._bootstrap = owner.bootstrap
        self._files = files
        self._leash_s = leash_s
        self._clock = clock or SystemClock()
        self._on_event = on_event or (lambda line: _log.info("%s", line))
        self._lock = threading.RLock()
        self._placement = Placement(settings.partitions, settings.actors)
        self._fleet: Fleet | None = None
        self._coordinator: Coordinator | None = None
        self._scaling: _Scaling | None = None
        self._lending: Lending | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._answers: dict[str, RayPipelineError | None] = {}
        self._state = "starting"
        self._started_ms = self._clock.now_ms()
        self._published_ms = 0
        self._stopping = False
        self._may_begin = False
        self._error: Exception | None = None
        self._end = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="generator-stage", daemon=True)

    # -- life

    def start(self) -> None:
        """Build the model and start the actors; returns as soon as they are started."""
        settings = self._settings
        catalogue = load_catalogue(settings)
        user_map = build_user_map(settings)
        shares = [user_map.share(p) for p in range(settings.partitions)]
        self._coordinator = Coordinator(settings, settings.digest(catalogue.digest), shares, self._leash_s)
        self._lending = Lending(
            settings,
            self._bootstrap,
            self._coordinator,
            self._placement,
            self._lock,
            self._clock,
            self._note,
            self._answer,
        )
        self._catalogue_digest = catalogue.digest
        movies = build_shared_movies(settings, catalogue)
        self._fleet = Fleet(settings, self._owner, movies, self._files, self._placement, self._clock, self._note)
        self._fleet.grow(settings.actors)
        self._thread.start()

    def begin(self) -> None:
        """Let the shards send as soon as they are ready."""
        self._may_begin = True
        self._wake.set()

    def wait_until_ready(self, deadline_s: float) -> None:
        """Block until every shard has its delivery open.

        Raises:
            StageFailedError: not within the deadline, or a shard failed.
        """
        self._wait(
            lambda: self.coordinator.ready,
            deadline_s,
            StageFailedError(
                problem=f"the generator actors did not start within {deadline_s:.0f} s",
                fix="See ray-pipeline doctor for CPUs, memory and the broker",
            ),
        )

    def wait_until_sending(self, deadline_s: float) -> None:
        """Block until the plan is made and every shard is about to be told.

        Raises:
            StageFailedError: not within the deadline, or a shard failed.
            RayPipelineError: what a shard or the coordinator says.
        """
        self._wait(
            lambda: self.coordinator.started,
            deadline_s,
            StageFailedError(
                problem=f"the generator did not begin to send within {deadline_s:.0f} s", fix="See its log"
            ),
        )

    def _wait(self, reached: Callable[[], bool], deadline_s: float, late: RayPipelineError) -> None:
        deadline_ms = self._clock.now_ms() + int(deadline_s * 1000)
        while not reached():
            self.check()
            if self._clock.now_ms() > deadline_ms:
                raise late
            self._clock.wait(self._end, 0.05)

    def stop(self, deadline_s: float) -> bool:
        """Have every shard commit what it sent and end; end the actors.

        Returns:
            Whether all ended in order within ``deadline_s`` seconds.
        """
        self._begin_to_stop()
        deadline_ms = self._clock.now_ms() + int(deadline_s * 1000)
        while self._thread.is_alive() and not self.totals().ended and self._clock.now_ms() < deadline_ms:
            self._clock.wait(threading.Event(), 0.05)
        in_order = self.totals().finished
        self.kill()
        return in_order

    def kill(self) -> None:
        """End the actors at once, if they still run."""
        self._end.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(15)
        if self._fleet is not None:
            self._fleet.shrink(0)

    def _begin_to_stop(self) -> None:
        with self._lock:
            self._stopping = True
            self._state = "stopping" if self._state != "failed" else self._state
        self._wake.set()

    # -- asked and told

    @property
    def coordinator(self) -> Coordinator:
        """Plan and totals; exists from :meth:`start` on."""
        if self._coordinator is None:
            msg = "the stage was not started"
            raise RuntimeError(msg)
        return self._coordinator

    @property
    def fleet(self) -> Fleet:
        """The actors; exist from :meth:`start` on."""
        if self._fleet is None:
            msg = "the stage was not started"
            raise RuntimeError(msg)
        return self._fleet

    @property
    def lending(self) -> Lending:
        """The shards in other hands; exists from :meth:`start` on."""
        if self._lending is None:
            msg = "the stage was not started"
            raise RuntimeError(msg)
        return self._lending

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

    def set_plan(self, plan: str) -> None:
        """Follow another rate plan from now on; a text in the language of plans."""
        self._change(f"plan {plan}", plan=plan)

    def pause(self) -> None:
        """Send nothing until :meth:`resume`."""
        self._change("pause", paused=True)

    def resume(self) -> None:
        """Go on at the target rate."""
        self._change("resume", paused=False)

    def scale(self, actors: int, deadline_s: float = 120.0) -> None:
        """Have another number of actors, without a gap or a repeat; returns when they have all partitions.

        Raises:
            ConfigurationError: there are fewer partitions, or another such change is under way.
            EnvironmentProblem: the cluster has no room for so many.
            StageFailedError: the new actors did not start; the old ones go on.
        """
        identity = uuid.uuid4().hex[:12]
        self._begin_to_scale(actors, identity)
        late = StageFailedError(problem=f"{actors} actors are not there after {deadline_s:.0f} s", fix="See the status")
        self._wait(lambda: identity in self._answers, deadline_s, late)
        refusal = self._answers[identity]
        if refusal is not None:
            raise refusal

    def status(self) -> dict[str, Any]:
        """The record of topic ``ratings.progress``, key ``generator``."""
        with self._lock:
            now_ms = self._clock.now_ms()
            coordinator, totals = self.coordinator, self.coordinator.totals()
            answers = {identity: "" if error is None else str(error) for identity, error in self._answers.items()}
            return {
                "run": coordinator.run,
                "state": self._state,
                "target_rate": coordinator.target_rate(now_ms),
                "plan_rate": coordinator.plan_rate(now_ms),
                "plan": coordinator.plan,
                "epochs": [epoch.to_record() for epoch in coordinator.epochs[-_EPOCHS_TOLD:]],
                "delivered": totals.delivered,
                "base": totals.base,
                "requested": coordinator.requested,
                "behind_s": round(totals.behind_s, 3),
                "started_ms": self._started_ms,
                "clock_offset_ms": coordinator.event_now_ms(now_ms) - now_ms,
                "event_reached_ms": coordinator.event_reached_ms(now_ms),
                "updated_ms": now_ms,
                "restarts": self.fleet.restarts + totals.failures,
                "last_control": next(reversed(answers), ""),
                "answers": answers,
                "lent": self.lending.record,
                "actors": self.fleet.status(),
                "events": list(self._events),
            }

    # -- the watching thread

    def _watch(self) -> None:
        publisher = Publisher(self._bootstrap)
        try:
            self._watch_until_end(publisher)
            if self._state != "failed":
                self._state = "stopped"
        except Exception as error:  # noqa: BLE001 - kept for check(), which raises it where it is waited for
            _log.error("generator: %s", error, exc_info=not isinstance(error, RayPipelineError))
            self._error = error
            self._state = "failed"
        finally:
            publisher.put(self._settings.progress_topic, "generator", self.status())
            publisher.close()

    def _watch_until_end(self, publisher: Publisher) -> None:
        control = ControlFeed(self._bootstrap, self._settings.control_topic)
        run_published = False
        try:
            while not self._end.is_set():
                self._wake.clear()
                for command in control.poll():
                    self._obey(command)
                if self._stopping and self.lending.active:
                    self.lending.take_back("backfill cut short: the generator stops")
                self._exchange()
                self._go_on_scaling()
                self.lending.step()
                if self.coordinator.started and not run_published:
                    publisher.put(self._settings.progress_topic, "run", self._run_record())
                    run_published = True
                if self._clock.now_ms() - self._published_ms >= _PUBLISH_MS:
                    self._published_ms = self._clock.now_ms()
                    publisher.put(self._settings.progress_topic, "generator", self.status())
                self._clock.wait(self._wake, _HURRY_S if self._state == "backfilling" else _POLL_S)
        finally:
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
            "outside_topic": self._settings.outside_topic,
        }

    def _exchange(self) -> None:
        """Tell the actors what is wanted and hear them; once more at once when that leaves something to tell."""
        news = self._news()
        reports = self.fleet.exchange(
            news, self._stopping, self.coordinator.leash_ms(self._clock.now_ms()), self._state
        )
        with self._lock:
            coordinator = self.coordinator
            coordinator.observe(reports)
            failed = coordinator.totals().failed
            if failed and not self._stopping:
                raise StageFailedError(problem=failed, fix="See the log of the generator actors")
            if coordinator.started and self._state in ("starting", "backfilling", "running", "paused"):
                self._state = self._state_while_sending()
        if self._news().keys() & {report.partition for report in reports}:
            self._wake.set()

    def _state_while_sending(self) -> str:
        backfilling = self.coordinator.backfilling(self._clock.now_ms())
        if self._settings.speed != 1.0 and self._state in ("starting", "backfilling") and not backfilling:
            self._note("the stream has reached the present: it is live")
        return "paused" if self.coordinator.paused else "backfilling" if backfilling else "running"

    def _news(self) -> dict[int, Assignment]:
        with self._lock:
            return self.coordinator.assignments(self._clock.now_ms()) if self._may_begin else {}

    def _note(self, line: str) -> None:
        self._events.append({"at_ms": self._clock.now_ms(), "what": line})
        self._on_event(line)

    # -- control

    def _obey(self, command: dict[str, Any]) -> None:
        what, identity = command.get("command"), str(command.get("id", ""))
        try:
            if what == "rate":
                self.set_rate(float(command["rate"]))
            elif what == "plan":
                self.set_plan(str(command["plan"]))
            elif what == "pause":
                self.pause()
            elif what == "resume":
                self.resume()
            elif what == "scale":
                self._begin_to_scale(command["actors"], identity)
                return  # answered when it is done
            elif what == "lend":
                self._begin_to_lend(command["events"], identity)
                return  # answered when it is done
            elif what == "keep":
                self.lending.keep(str(command["loan"]))
                return  # said every few seconds: not answered
            elif what == "return":
                self.lending.end(str(command["loan"]))
            elif what == "stop":
                self._note("stop was asked for")
                self._begin_to_stop()
            else:
                raise ConfigurationError(problem=f"unknown control command {json.dumps(command)[:200]}")
        except RayPipelineError as error:
            self._answer(identity, error)
        except (KeyError, TypeError, ValueError):
            self._answer(identity, ConfigurationError(problem=f"malformed command {json.dumps(command)[:200]}"))
        else:
            self._answer(identity, None)

    def _answer(self, identity: str, refusal: RayPipelineError | None) -> None:
        """Keep what became of a command, and say it at once."""
        if refusal is not None:
            self._note(f"control command refused: {refusal}")
        with self._lock:
            self._answers[identity] = refusal
            for old in list(self._answers)[:-_ANSWERS_KEPT]:
                del self._answers[old]
        self._published_ms = 0

    def _begin_to_lend(self, events: Any, identity: str) -> None:
        if self._scaling is not None or self._stopping:
            doing = "the actors change in number" if self._scaling else "the generator stops"
            raise ConfigurationError(problem=f"not now: {doing}", fix="Wait for its end")
        self.lending.begin(identity, events)
        self._wake.set()

    def _change(
        self, what: str, *, rate: float | None = None, plan: str | None = None, paused: bool | None = None
    ) -> None:
        if self.lending.active:
            raise ConfigurationError(problem="not now: a backfill is under way", fix="Wait for its end")
        with self._lock:
            self.coordinator.change(self._clock.now_ms(), rate=rate, plan=plan, paused=paused)
        self._note(what)
        self._wake.set()

    # -- another number of actors

    def _begin_to_scale(self, actors: Any, identity: str) -> None:
        partitions = self._settings.partitions
        if not isinstance(actors, int) or not 1 <= actors <= partitions:
            raise ConfigurationError(
                problem=f"{actors!r} actors cannot share {partitions} partitions: an actor has whole ones",
                fix=f"Give a number from 1 to {partitions}",
            )
        with self._lock:
            if self._scaling is not None or self._stopping or self.lending.active:
                doing = f"{self._scaling.actors} actors are being made" if self._scaling else "the generator stops"
                doing = "a backfill is under way" if self.lending.active else doing
                raise ConfigurationError(problem=f"not now: {doing}", fix="Wait for its end")
            self._scaling = _Scaling(identity, actors, len(self.fleet), self._clock.now_ms())
        self._note(f"scale from {len(self.fleet)} to {actors} actors")
        self._wake.set()

    def _go_on_scaling(self) -> None:
        scaling = self._scaling
        if scaling is None:
            return
        now_ms = self._clock.now_ms()
        if not scaling.starting and self._has_room(scaling, now_ms):
            self.fleet.grow(scaling.actors)
            scaling.starting = True
        elif scaling.starting and not scaling.passing:
            if self.fleet.all_heard:
                self._placement.spread(scaling.actors, now_ms)
                scaling.passing = True
                self._wake.set()
            elif now_ms - scaling.since_ms > _NEW_ACTORS_MS:
                self.fleet.shrink(scaling.before)
                late = f"the new actors did not start within {_NEW_ACTORS_MS // 1000} s: the {scaling.before} old ones go on"
                self._end_scaling(StageFailedError(problem=late, fix="See ray-pipeline doctor for CPUs and memory"))
        elif scaling.passing and self._placement.settled:
            self.fleet.shrink(scaling.actors)
            self._note(f"{scaling.actors} actors have all partitions")
            self._end_scaling(None)

    def _has_room(self, scaling: _Scaling, now_ms: int) -> bool:
        needed = (scaling.actors - scaling.before) * ACTOR_CPUS
        if needed <= 0:
            return True
        free = float(ray.available_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]
        if free + 1e-6 >= needed:
            return True
        if now_ms - scaling.since_ms > _ROOM_MS:
            self._end_scaling(
                EnvironmentProblem(
                    problem=f"{scaling.actors} actors need {needed:g} more CPUs and the Ray cluster has {free:g} free: "
                    f"the {scaling.before} old ones go on",
                    fix="Give a lower number, add nodes, or stop other jobs",
                )
            )
        return False

    def _end_scaling(self, refusal: RayPipelineError | None) -> None:
        scaling, self._scaling = self._scaling, None
        assert scaling is not None
        self._answer(scaling.identity, refusal)
