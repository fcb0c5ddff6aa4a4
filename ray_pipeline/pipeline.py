"""The whole pipeline as one object: starts the stages side by side, watches them, ends them in order."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ray_pipeline import doctor
from ray_pipeline.clock import SystemClock
from ray_pipeline.cluster.head import named_cluster
from ray_pipeline.cluster.token import present_token
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.errors import (
    ConfigurationError,
    ProcessingError,
    RayPipelineError,
    StageFailedError,
)
from ray_pipeline.generator.coordination import check_same_stream
from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.client import check_broker
from ray_pipeline.kafka.publish import Publisher
from ray_pipeline.kafka.read import count_records, newest_of_key, newest_records
from ray_pipeline.kafka.supervisor import BrokerSupervisor
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.metrics.rate import RateMeter
from ray_pipeline.metrics.records import UnreadableRecord, read_window
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.state import RunInfo, claimed_stage, forget_run, remember_run, require_writable
from ray_pipeline.windows.spec import window_specs

__all__ = ["ALL_STAGES", "Pipeline", "Status", "Summary"]

_log = logging.getLogger(__name__)

ALL_STAGES = ("generate", "process", "serve", "verify")
_START_DEADLINE_S = 180.0
_WATCH_S = 0.2
_ANSWER_S = 60.0
_TELL_EVERY_S = 3.0
_PUBLISH_S = 2.0
_VERIFY_DEADLINE_S = 15.0
_LEAST_LEASH_S = 1.0


@dataclass(frozen=True, slots=True)
class Status:
    """How a pipeline stands.

    Attributes:
        state: the generator's state; the job's where no generator runs here.
        target_rate: ratings per second, 0 = paused.
        delivered_rate: ratings per second.
        delivered: ratings of this run.
        windows: tumbling windows that were open in this run, closed ones included.
        lag: ratings in Kafka that Spark has not read.
        behind_s: how long the most overdue rating has been due, seconds.
        event_reached_ms: event time up to which all was sent, epoch milliseconds; None before the start.
        batch_ms: length of the last micro-batch, milliseconds.
        verified: windows that are final and hold what they must; None where nobody serves here.
        wrong: windows that do not.
    """

    state: str
    target_rate: float
    delivered_rate: float
    delivered: int
    windows: int
    lag: int
    behind_s: float
    event_reached_ms: int | None
    batch_ms: int
    verified: int | None
    wrong: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did. Counts are of this run, not of earlier ones on the same topics.

    Attributes:
        requested: ratings asked for; None = until stopped.
        delivered: ratings committed to Kafka; None, as all counts then, when it was stopped while it began to send.
        counted: ratings counted in tumbling windows, those from outside too.
        late_dropped: ratings dropped as late.
        rejected: records of the ratings topic that are no valid rating.
        windows: tumbling windows counted into.
        first_window_s: from the start of the command (from Python: of the pipeline) to the first window, seconds; None when there was
            none.
        duration_s: from there to the end, seconds.
        stages: seconds each part of the start took.
    """

    requested: int | None
    delivered: int | None
    counted: int | None
    late_dropped: int | None
    rejected: int | None
    windows: int | None
    first_window_s: float | None
    duration_s: float
    stages: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class Pipeline:
    """Generator, windows, API and dashboard on one Ray; on an embedded broker unless the settings name another.

    A context manager: ``with Pipeline(rate=500) as p: p.set_rate(1000)``.

    Args:
        settings: all settings; None = from environment and defaults.
        stages: which of :data:`ALL_STAGES` to run.
        on_event: is called with a line when something noteworthy happens.
        before_s: seconds that the command has taken until now, for its imports: times are counted from its beginning.
        flags: settings by name, in place of ``settings``.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        stages: tuple[str, ...] = ALL_STAGES,
        on_event: Callable[[str], None] | None = None,
        before_s: float = 0.0,
        **flags: Any,
    ) -> None:
        if settings is not None and flags:
            msg = "give settings, or flags, not both"
            raise TypeError(msg)
        settings = settings or load_settings(**flags)
        if settings.sink != "kafka":
            raise ConfigurationError(
                problem=f"sink={settings.sink}: a pipeline delivers to Kafka",
                fix="Leave sink as it is, or call ray_pipeline.sinks.writing.write_ratings",
            )
        if settings.control_token is None:
            settings = settings.model_copy(update={"control_token": secrets.token_urlsafe(16)})
        self.settings = settings
        self.stages = stages
        self._tell = on_event or (lambda line: _log.info("%s", line))
        self._clock = SystemClock()
        self._began = 0.0
        self._before_s = before_s
        self._timings: dict[str, float] = {}
        self._first_window_s: float | None = None
        self._baseline: dict[str, int] | None = None
        self._bootstrap = ""
        self._posted_before = 0
        self._may_have_sent = False
        self._claims = contextlib.ExitStack()
        self._broker: BrokerSupervisor | None = None
        self._ray: Any = None
        self._generator: Any = None
        self._processing: Any = None
        self._serving: Any = None
        self._verifying: Any = None
        self._told: set[str] = set()
        self._publisher: Publisher | None = None
        self._published_s = 0.0
        self._rate = RateMeter()
        self._summary: Summary | None = None
        self._name = hashlib.sha256(str(settings.state_dir.absolute()).encode()).hexdigest()[:8] + f"-{os.getpid()}"

    def __enter__(self) -> Pipeline:
        """Start."""
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop; in order when all went well. An error stays the one that is raised."""
        if error is None:
            self.stop()
        else:
            self._end_after(error, lambda: self.stop(drain=False))

    # -- life

    def start(self) -> None:
        """Start all stages; returns when ratings flow, windows are computed, and API and dashboard answer.

        Raises:
            ConfigurationError: settings or state do not fit.
            EnvironmentProblem: Java, ports, disk or CPUs are missing.
            BrokerUnavailableError: the broker that was named does not answer.
            StageFailedError: a stage did not start.
        """
        self._began = time.monotonic() - self._before_s
        if self._before_s:
            self._timings["imports"] = round(self._before_s, 2)
        try:
            self._start()
        except BaseException as error:
            self._end_after(error, self._end)
            raise

    def wait(self, stop: threading.Event | None = None, on_status: Callable[[Status], None] | None = None) -> bool:
        """Watch until the bounded run has ended, or ``stop`` is set.

        Args:
            stop: ends the waiting.
            on_status: is called with the status a few times a second.

        Returns:
            Whether the run ended by itself, or was stopped by name; False = by ``stop``.

        Raises:
            RayPipelineError: a stage failed for good.
        """
        stop = stop or threading.Event()
        while not stop.is_set():
            self.check()
            if on_status is not None:
                on_status(self.status())
            if self._generator is not None and self._generator.totals().finished:
                return True
            if self._stop_asked():
                self._tell("stop was asked for")
                return True
            stop.wait(_WATCH_S)
        return False

    def stop(self, drain: bool = True) -> Summary:
        """End in order: generator, windows over all that was sent, API and dashboard, Ray, broker.

        Args:
            drain: have the windows of all that was sent come out first.

        Returns:
            What the run did.

        Raises:
            ProcessingError: the last windows did not come out.
            StageFailedError: the embedded broker was given up; all else is ended at once then.
        """
        if self._summary is None:
            try:
                self._stop_stages(drain)
                self._summary = self._summarize()
            finally:
                self._end()
        return self._summary

    def _stop_asked(self) -> bool:
        actors = (self._processing, self._serving, self._verifying, self._generator and self._generator.fleet)
        return any(one is not None and one.stop_asked for one in actors)

    # -- asked and told

    @property
    def bootstrap_servers(self) -> str:
        """The brokers, HOST:PORT[,…]."""
        return self._bootstrap

    @property
    def urls(self) -> dict[str, str]:
        """Where ``api`` and ``ui`` are; empty when not served here."""
        return dict(self._serving.status.get("urls", {})) if self._serving is not None else {}

    @property
    def timings(self) -> dict[str, float]:
        """Seconds each part of the start took."""
        return dict(self._timings)

    @property
    def first_window_s(self) -> float | None:
        """Seconds from the start to the first window; None so far."""
        return self._first_window_s

    def set_rate(self, rate: float) -> None:
        """Change the target rate, ratings per second.

        Raises:
            ConfigurationError: it is no number above 0.
        """
        self._need("generate").set_rate(rate)

    def set_plan(self, plan: str) -> None:
        """Follow another rate plan from now on.

        Args:
            plan: text in the language of plans, such as ``"ramp(0..500, 10m) then 500"``.

        Raises:
            PlanError: it is malformed.
        """
        self._need("generate").set_plan(plan)

    def pause(self) -> None:
        """Send nothing until :meth:`resume`."""
        self._need("generate").pause()

    def resume(self) -> None:
        """Go on at the target rate."""
        self._need("generate").resume()

    def scale(self, actors: int) -> None:
        """Have another number of generator actors, without a gap or a repeat; returns when they have all partitions.

        Raises:
            ConfigurationError: there are fewer partitions, or another such change is under way.
            EnvironmentProblem: the cluster has no room for so many.
            StageFailedError: the new actors did not start; the old ones go on.
        """
        self._need("generate").scale(actors)

    def metrics(self) -> dict[str, Any]:
        """What ``GET /metrics/summary`` says, with health."""
        found: dict[str, Any] = self._need("serve").call("snapshot", timeout_s=30.0)
        return found

    def batch(self, timeout_s: float = 600.0) -> dict[str, Any]:
        """The batch report over everything in the ratings topic, in the running Spark application."""
        found: dict[str, Any] = self._need("process").call("run_batch", timeout_s=timeout_s)
        return found

    def generator_status(self) -> dict[str, Any]:
        """The generator's record of topic ``ratings.progress``."""
        found: dict[str, Any] = self._need("generate").status()
        return found

    def job_status(self) -> dict[str, Any]:
        """The Spark job's record of topic ``metrics.progress``, with its process id."""
        return dict(self._need("process").status)

    def status(self) -> Status:
        """How the pipeline stands; returns at once."""
        now_ms = self._clock.now_ms()
        generator = self._generator.status() if self._generator is not None else {}
        job = self._processing.status if self._processing is not None else {}
        checked = self._serving.status.get("windows") if self._serving is not None else None
        self._note_first_window(job)
        return Status(
            state=str(generator.get("state") or job.get("state") or "running"),
            target_rate=float(generator.get("plan_rate", 0.0)),
            delivered_rate=self._rate.rate(now_ms),
            delivered=int(generator.get("delivered", 0)),
            windows=self._windows(job),
            lag=int(job.get("lag", 0)),
            behind_s=float(generator.get("behind_s", 0.0)),
            event_reached_ms=generator.get("event_reached_ms"),
            batch_ms=int(job.get("batch_duration_ms", 0)),
            verified=checked["verified"] + checked["late"] if checked else None,
            wrong=checked["wrong"] if checked else 0,
        )

    def _windows(self, job: dict[str, Any]) -> int:
        ledger, before = job.get("ledger"), (self._baseline or {}).get("closed_windows", 0)
        return len(ledger["open"]) + int(ledger["closed_windows"]) - before if ledger else 0

    def check(self) -> None:
        """Raise what made a stage fail for good, if anything did; publish how the cluster is used."""
        for stage in (self._broker, self._generator, self._processing, self._serving, self._verifying):
            if stage is not None:
                stage.check()
        if self._processing is not None:
            self._note_first_window(self._processing.status)
        if self._verifying is not None:
            self._tell_of_failed_checks()
        if self._generator is not None:
            self._rate.add(self._clock.now_ms(), self._generator.totals().delivered)
        if self._publisher is not None and time.monotonic() - self._published_s >= _PUBLISH_S:
            self._published_s = time.monotonic()
            self._publisher.put(self.settings.progress_topic, f"pipeline/{self._name}", self._pipeline_record())

    def _tell_of_failed_checks(self) -> None:
        """Once each: the stream goes on without them, and health says so."""
        for name, told in (("oracle", "the oracle"), ("scores", "the scoreboard"), ("answers", "the answer key")):
            said = self._verifying.status.get(name, {})
            if said.get("state") == "failed" and name not in self._told:
                self._told.add(name)
                self._tell(f"{told} failed: {said['reason']}")

    # -- starting

    def _start(self) -> None:
        settings = self.settings
        if settings.backfill is not None and not {"generate", "process"} <= set(self.stages):
            raise ConfigurationError(
                problem=f"backfill={settings.backfill} needs generator and Spark job in one pipeline",
                fix="Run both, or tell them later with: ray-pipeline backfill --to ratings",
            )
        require_writable(settings.state_dir)
        for stage, what in (("generate", "a pipeline"), ("process", "a Spark job")):
            if stage in self.stages:
                self._claims.enter_context(claimed_stage(settings.state_dir, stage, what))
        doctor.require(settings, self.stages)
        self._timings["checks"] = round(self._elapsed() - self._before_s, 2)
        if named_cluster(settings.ray_address):
            present_token()
        from ray_pipeline.cluster.runtime import RayRuntime

        self._ray = RayRuntime(settings, self.stages)
        with ThreadPoolExecutor(1, "start") as pool:
            broker = pool.submit(self._timed, "broker", self._start_broker)
            # Ray's processes end with the thread that started them, so that must not be one of the pool
            self._timed("ray", self._ray.start)
            broker.result()
        self._start_stages()
        self._remember()
        self._publisher = Publisher(self._bootstrap)

    def _start_broker(self) -> None:
        settings = self.settings
        if brokers := settings.brokers:
            self._bootstrap = brokers
            check_broker(brokers)
        else:
            self._tell("starting the Kafka broker")
            broker = EmbeddedBroker(settings.state_dir, settings.broker_port)
            self._broker = BrokerSupervisor(broker, self._tell)
            self._broker.start()
            self._bootstrap = broker.bootstrap_servers
            self._tell(f"Kafka broker at {self._bootstrap}")
        ensure_topics(settings, self._bootstrap)
        if "process" in self.stages:
            self._posted_before = count_records(self._bootstrap, settings.outside_topic).total
        if "generate" in self.stages:
            self._check_configuration()

    def _check_configuration(self) -> None:
        """Refuse a topic that holds another stream, before anything expensive is started."""
        settings = self.settings
        # not in a transaction, and so not to be held up by one that a killed shard left open: opening the shards ends it
        value = newest_of_key(self._bootstrap, settings.progress_topic, "run", 30.0, committed=False)
        if value is not None:
            check_same_stream(settings, settings.digest(load_catalogue(settings).digest), json.loads(value)["config"])

    def _start_stages(self) -> None:
        from ray_pipeline.cluster.files import SharedFiles
        from ray_pipeline.cluster.generation import GeneratorStage
        from ray_pipeline.cluster.membership import Owner
        from ray_pipeline.cluster.stages import build_processing_actor, build_serving_actor, build_verification_actor
        from ray_pipeline.cluster.supervised import SupervisedActor

        settings, bootstrap = self.settings, self._bootstrap
        self._tell("Ray is up")
        files = SharedFiles.of(settings)
        owner = Owner.of_this_process(self._name, self.stages, bootstrap, has_ray=self._ray.local)
        if "process" in self.stages:
            self._tell("starting Spark on Ray")
            self._processing = SupervisedActor(
                "the Spark job", lambda: build_processing_actor(settings, owner, files), self._tell
            )
            self._processing.start()
        if "serve" in self.stages:
            self._serving = SupervisedActor(
                "the API server", lambda: build_serving_actor(settings, owner, files), self._tell
            )
            self._serving.start()
        if "verify" in self.stages:
            self._verifying = SupervisedActor(
                "the oracle", lambda: build_verification_actor(settings, owner, files), self._tell
            )
            self._verifying.start()
        if "generate" in self.stages:
            # half the watermark for shards to be apart, the other half for what a micro-batch reads of one and not of another
            leash_s = max(_LEAST_LEASH_S, settings.watermark_s / 2) if "process" in self.stages else None
            self._generator = GeneratorStage(settings, owner, files, on_event=self._tell, leash_s=leash_s)
            self._timed("model", self._generator.start)
        waits = {
            "generator": lambda: self._generator and self._generator.wait_until_ready(_START_DEADLINE_S),
            "serving": lambda: self._serving and self._serving.wait_until_up(_START_DEADLINE_S),
            "oracle": lambda: self._verifying and self._verifying.wait_until_up(_START_DEADLINE_S),
            "spark": lambda: self._processing and self._processing.wait_until_up(_START_DEADLINE_S),
        }
        with ThreadPoolExecutor(len(waits), "start") as pool:
            for done in [pool.submit(self._timed, name, wait) for name, wait in waits.items()]:
                done.result()
        if self._processing is not None:  # what it found, before it is begun again and finds more
            self._note_first_window(self._processing.status)
        if self._generator is not None:
            # not before Spark is up: a start has no backlog then, and no rival for the CPUs
            self._may_have_sent = True
            if settings.backfill is not None:
                self._timed("backfill", self._backfill)
            self._generator.begin()
            self._generator.wait_until_sending(_START_DEADLINE_S)

    def _backfill(self) -> None:
        """Have Spark send the history that the settings ask for, unless the topic has ratings already."""
        events = self.settings.backfill
        if self._generator.coordinator.begun:
            self._tell("no backfill: the topic has ratings already")
            return
        self._processing.call("start_history", events, timeout_s=_ANSWER_S)
        told_s = time.monotonic()
        while (status := self._processing.call("history_status", timeout_s=_ANSWER_S))["state"] == "running":
            self.check()
            if time.monotonic() - told_s > _TELL_EVERY_S:
                told_s = time.monotonic()
                self._tell(f"backfill: {status['done']:,} of {status['total']:,} ratings")
            time.sleep(_WATCH_S)
        if status["state"] != "done":
            raise status["error"] or StageFailedError(problem=f"the backfill {status['state']}: {status['reason']}")
        self._tell(f"backfill: {status['total']:,} ratings sent")

    def _timed(self, name: str, call: Callable[[], object]) -> None:
        began = time.monotonic()
        call()
        self._timings[name] = round(time.monotonic() - began, 2)
        said = {
            "generator": ("generate", "generator actors are ready"),
            "serving": ("serve", "API and dashboard answer"),
            "spark": ("process", "the Spark query runs"),
        }
        if name in said and said[name][0] in self.stages:
            self._tell(f"{said[name][1]} ({self._elapsed():.1f} s)")

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._began, 2)

    def _remember(self) -> None:
        import ray

        stages = (*(("broker",) if self._broker else ()), *self.stages)
        remember_run(
            self.settings.state_dir,
            RunInfo.of_this_process(
                self._bootstrap,
                stages=stages,
                name=self._name,
                ray_address=ray.get_runtime_context().gcs_address,
                token=self.settings.control_token or "",
                urls=self.urls,
            ),
        )

    # -- while running

    def _note_first_window(self, job: dict[str, Any]) -> None:
        if self._baseline is None and "restored_counted" in job:
            self._baseline = {
                name: int(job[f"restored_{name}"])
                for name in ("batch", "records", "counted", "late_dropped", "rejected", "closed_windows")
            }
        if self._first_window_s is None and self._baseline and int(job.get("counted", 0)) > self._baseline["counted"]:
            self._first_window_s = self._elapsed()
            self._timings["first window"] = self._first_window_s
            self._tell(f"first window after {self._first_window_s:.1f} s")

    def _pipeline_record(self) -> dict[str, Any]:
        from ray_pipeline.cluster.runtime import cluster_usage

        return {
            "name": self._name,
            "pid": os.getpid(),
            "stages": list(self.stages),
            "updated_ms": self._clock.now_ms(),
            "urls": self.urls,
            "timings": self._timings,
            "restarts": {
                s.name: s.restarts for s in (self._processing, self._serving, self._verifying) if s is not None
            }
            | ({"the broker": self._broker.restarts} if self._broker else {}),
            "cluster": cluster_usage(),
            "holders": self._holders(),
        }

    def _holders(self) -> list[dict[str, Any]]:
        """Who of this pipeline holds what: as Ray set CPUs aside for each actor, and as each process, and Spark, says it."""
        from ray_pipeline.cluster.membership import held_by_process, held_together

        job = self._processing.status if self._processing is not None else {}
        broker_pid = self._broker.broker.pid if self._broker is not None else None
        stages = (("API and dashboard", self._serving), ("oracle", self._verifying))
        held = {
            "generator": self._generator.fleet.held() if self._generator is not None else [],
            "Spark driver": [job.get("held")],
            "Spark executors": [job.get("executors_hold")],
            **{who: [stage.status.get("held")] for who, stage in stages if stage is not None},
            "supervisor": [held_by_process(os.getpid())],
            "Kafka broker": [held_by_process(broker_pid)] if broker_pid is not None else [],
        }
        return [
            {"who": who, **held_together([one for one in those if one])} for who, those in held.items() if any(those)
        ]

    # -- ending

    def _end_after(self, error: BaseException, end: Callable[[], object]) -> None:
        """End because of an error. What else goes wrong is said: raised, it would hide the cause."""
        try:
            end()
        except Exception as more:  # noqa: BLE001 - a line; the caller raises the cause
            if more is not error:
                self._tell(f"while stopping: {more}")

    def _stop_stages(self, drain: bool) -> None:
        deadline_s = self.settings.stop_timeout_s
        self._check_broker()  # without one nobody can commit or publish anything, and all would wait for it
        if self._generator is not None:
            self._tell("stopping the generator")
            if not self._generator.stop(deadline_s):
                self._tell("the generator did not end in order; what it had not committed is sent again next time")
        if self._processing is not None:
            if drain:
                self._tell("waiting for the last windows")
                self._drain()
            self._processing.stop_watching()
            try:
                self._processing.call("stop", timeout_s=deadline_s)
            except StageFailedError as error:
                self._tell(f"{error}; its state is in the checkpoint")
        if self._verifying is not None:
            self._verifying.stop_watching()
            try:
                self._verifying.call("stop", _VERIFY_DEADLINE_S, timeout_s=_VERIFY_DEADLINE_S + 10)
            except StageFailedError as error:
                self._tell(f"{error}; the next run goes on with it")

    def _check_broker(self) -> None:
        if self._broker is not None:
            self._broker.check()

    def _drain(self) -> None:
        """Until Spark has read all; gives up when it makes no progress for the stop timeout."""
        deadline_s = self.settings.stop_timeout_s
        seen: tuple[Any, ...] = ()
        since = time.monotonic()
        while True:
            try:
                if self._processing.call("drain", 5.0, timeout_s=30.0):
                    self._processing.refresh()
                    self._note_first_window(self._processing.status)
                    return
            except StageFailedError:
                _log.debug("the Spark job is away; it comes back")
            self._check_broker()
            self._processing.check()
            status = self._processing.status
            reached = status.get("counted"), (status.get("archive") or {}).get("batch")
            if reached != seen:
                seen, since = reached, time.monotonic()
            if time.monotonic() - since > deadline_s:
                raise ProcessingError(
                    problem=f"the last windows did not come out within {deadline_s:.0f} s",
                    fix="They will with the next run on this state directory",
                )
            time.sleep(0.2)

    def _summarize(self) -> Summary:
        if self._generator is None and "generate" in self.stages:  # it was stopped while it started
            count = None if self._may_have_sent else 0
            requested = self.settings.ratings
            return Summary(requested, count, count, count, count, count, None, self._elapsed(), self._timings)
        job = self._processing.status if self._processing is not None else {}
        baseline = self._baseline or {"batch": -1, "records": 0, "counted": 0, "late_dropped": 0, "rejected": 0}
        totals = self._generator.totals() if self._generator is not None else None
        delivered = totals.delivered if totals is not None else 0
        # an earlier run may have ended before its last ratings were read: they are counted now, and are not this run's. Nor is what
        # was posted before it; what is posted in it is
        there_before = totals.base + self._posted_before if totals is not None else 0
        unread = max(0, there_before - baseline["records"])
        return Summary(
            requested=self._generator.coordinator.requested if self._generator is not None else None,
            delivered=delivered,
            counted=max(0, int(job.get("counted", 0)) - baseline["counted"] - unread),
            late_dropped=max(0, int(job.get("late_dropped", 0)) - baseline["late_dropped"]),
            rejected=max(0, int(job.get("rejected", 0)) - baseline["rejected"]),
            windows=self._count_windows(baseline["batch"]) if job else 0,
            first_window_s=self._first_window_s,
            duration_s=self._elapsed(),
            stages=self._timings,
        )

    def _count_windows(self, after_batch: int) -> int:
        """Tumbling windows that have changed in batches after a given one. What somebody else wrote there is none."""
        tumbling = window_specs(self.settings)[0].name
        count = 0
        for key, found in newest_records(self._bootstrap, self.settings.metrics_topic).items():
            with contextlib.suppress(UnreadableRecord):  # health has named it, and the audit does
                record = read_window(key, found.value or b"")
                if (record["kind"], record["window_type"]) == ("total", tumbling) and record["batch"] > after_batch:
                    count += 1
        return count

    def _end(self) -> None:
        """Let go of everything, whatever state it is in."""
        if self._generator is not None:
            self._generator.kill()
        if self._publisher is not None:
            self._publisher.put(self.settings.progress_topic, f"pipeline/{self._name}", None)
            self._publisher.close(2.0)
            self._publisher = None
        if self._serving is not None:
            self._serving.stop_watching()
            try:
                self._serving.call("stop", 5.0, timeout_s=15.0)
            except RayPipelineError as error:
                _log.info("%s", error)
            self._serving.kill()
        for stage in (self._processing, self._verifying):
            if stage is not None:
                stage.kill()
        self._generator = self._processing = self._serving = self._verifying = None
        if self._ray is not None:
            self._ray.stop()
            self._ray = None
        if self._broker is not None:
            self._tell("stopping the Kafka broker")
            self._broker.stop()
            self._broker = None
        forget_run(self.settings.state_dir)
        self._claims.close()

    def _need(self, stage: str) -> Any:
        found = {"generate": self._generator, "process": self._processing, "serve": self._serving}[stage]
        if found is None:
            raise ConfigurationError(problem=f"the stage {stage!r} does not run in this pipeline", fix="Start it")
        return found
