"""Commands that run something until it ends or is stopped."""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.command.followers import known_as_follower
from ray_pipeline.command.options import BROKER, GENERATOR, PROCESSOR, SERVING, SINK, VERIFIER, with_settings
from ray_pipeline.command.results import require_file, write_file
from ray_pipeline.command.terminal import take_terminal
from ray_pipeline.config import SECURITY_FIELDS, Settings
from ray_pipeline.errors import ConfigurationError, StageFailedError
from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.client import check_broker
from ray_pipeline.kafka.read import follow
from ray_pipeline.kafka.supervisor import BrokerSupervisor
from ray_pipeline.kafka.topics import ensure_topics, partitions_of
from ray_pipeline.pipeline import ALL_STAGES, Pipeline, Status
from ray_pipeline.serving.reach import told
from ray_pipeline.sinks.writing import write_ratings
from ray_pipeline.state import RunInfo, active_run, brokers_of, forget_run, remember_run, require_writable
from ray_pipeline.windows.spec import iso_ms, window_specs

__all__ = ["StopSignal", "broker", "generate", "process", "run", "serve", "verify"]

_STATUS_EVERY_S = 3.0
_FORCED_EXIT = 130
_ONE_SIGNAL_MS = 1_000
"""Signals of one kind that come so soon are one: what `timeout` sends to all of a group, `make` sends to the command once more."""

_SUMMARY = "--summary-json"
SUMMARY_FILE = Annotated[Path | None, typer.Option(_SUMMARY, help="write the summary to this file as JSON")]


class StopSignal:
    """Set by Ctrl-C or SIGTERM; the second one ends the process at once, unless it is the first one once more.

    Args:
        to_stderr: whether to say so on standard error, as the standard output is for data.
        clock: tells the time.
    """

    def __init__(self, to_stderr: bool = False, clock: Clock | None = None) -> None:
        self.event = threading.Event()
        self._to_stderr = to_stderr
        self._clock = clock or SystemClock()
        self._first: tuple[int, int] | None = None
        self._give_terminal_back: Callable[[], None] = lambda: None

    def install(self) -> None:
        """Take the signals; from a terminal they come to this command alone."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        self._give_terminal_back = take_terminal()

    def _on_signal(self, number: int, _frame: object) -> None:
        now_ms = self._clock.now_ms()
        if self._first is not None:
            before, at_ms = self._first
            if number == before and now_ms - at_ms < _ONE_SIGNAL_MS:
                return
            self._give_terminal_back()
            os._exit(_FORCED_EXIT)
        self._first = number, now_ms
        say(f"{signal.Signals(number).name}: stopping in order (again: at once)", self._to_stderr)
        self.event.set()
        raise_in_start = self._starting
        if raise_in_start:
            raise KeyboardInterrupt

    _starting = True

    def started(self) -> None:
        """From now on a signal only sets the event."""
        self._starting = False


def say(line: str, to_stderr: bool = False) -> None:
    """One line on the terminal, at once."""
    typer.echo(f"{time.strftime('%H:%M:%S')}  {line}", err=to_stderr)
    sys.stdout.flush()


@with_settings(*BROKER, *GENERATOR, "backfill", *PROCESSOR, *SERVING, *SINK)
def run(settings: Settings, summary_json: SUMMARY_FILE = None) -> None:
    """Run the whole pipeline: broker, generator, windows, API and dashboard.

    Without --duration or --ratings until Ctrl-C. A second run on the same state directory goes on where the first stopped.
    With another --sink than kafka: write the same ratings to a file or a pipe, and nothing else.
    """
    if summary_json is not None:
        require_file(summary_json, _SUMMARY)
    _run(settings, ALL_STAGES, summary_json)


@with_settings(*BROKER, *GENERATOR, *SINK)
def generate(settings: Settings, summary_json: SUMMARY_FILE = None) -> None:
    """Run the generator alone, against any broker; or, with another --sink, into a file or a pipe."""
    if summary_json is not None:
        require_file(summary_json, _SUMMARY)
    _run(_with_broker(settings) if settings.sink == "kafka" else settings, ("generate",), summary_json)


@with_settings(*BROKER, *PROCESSOR)
def process(
    settings: Settings,
    console: Annotated[bool, typer.Option("--console", help="print each window when it changes")] = False,
) -> None:
    """Run the Spark job alone, against any broker, until Ctrl-C."""
    settings = _joining(settings)
    _run(settings, ("process",), None, _print_windows if console else None)


@with_settings(*BROKER, *SERVING)
def serve(settings: Settings) -> None:
    """Run API and dashboard alone, against any broker, until Ctrl-C."""
    from ray_pipeline import doctor
    from ray_pipeline.serving.server import ServingStage

    settings = _joining(settings)
    if settings.control_token is None:
        settings = settings.model_copy(update={"control_token": secrets.token_urlsafe(16)})
    brokers = settings.brokers
    assert brokers is not None
    stop = StopSignal()
    stop.install()
    doctor.require(settings, ("serve",))
    with known_as_follower(settings.state_dir, "serve", brokers):
        ensure_topics(settings, brokers)
        stage = ServingStage(settings, brokers)
        stage.start()
        stop.started()
        try:
            for name, url in stage.urls().items():
                say(f"{name}: {told(url, getattr(settings, f'{name}_host'))}")
            say(f"control token: {settings.control_token}")
            stop.event.wait()
        finally:
            stage.stop()


@with_settings(*BROKER, *VERIFIER)
def verify(settings: Settings) -> None:
    """Run oracle and scoreboard alone, against any broker, until Ctrl-C: what every window must hold, how learners do."""
    from ray_pipeline.verification.stage import VerificationStage

    settings = _joining(settings)
    brokers = settings.brokers
    assert brokers is not None
    stop = StopSignal()
    stop.install()
    with known_as_follower(settings.state_dir, "verify", brokers):
        ensure_topics(settings, brokers)
        stage = VerificationStage(settings, brokers)
        stage.start()
        stop.started()
        say("the oracle follows the stream")
        try:
            while not stop.event.wait(_STATUS_EVERY_S):
                oracle, scores = stage.status()["oracle"], stage.status()["scores"]
                if oracle["state"] == "failed":
                    raise StageFailedError(problem=f"the oracle failed: {oracle['reason']}", fix="")
                why = f": {scores['reason']}" if scores["reason"] else ""
                say(
                    f"{oracle['state']} | micro-batch {oracle['batch']}, {oracle['behind']} behind | "
                    f"scores {scores['state']}{why}"
                )
        finally:
            stage.stop()


@with_settings(*BROKER)
def broker(settings: Settings) -> None:
    """Run the embedded Kafka broker alone, until Ctrl-C."""
    from ray_pipeline import doctor

    require_writable(settings.state_dir)
    doctor.require(settings.model_copy(update={"bootstrap_servers": None}), ())
    stop = StopSignal()
    stop.install()
    supervisor = BrokerSupervisor(EmbeddedBroker(settings.state_dir, settings.broker_port), say)
    say("starting the Kafka broker")
    supervisor.start()
    stop.started()
    try:
        remember_run(
            settings.state_dir,
            RunInfo.of_this_process(supervisor.broker.bootstrap_servers, stages=("broker",)),
        )
        say(f"Kafka broker at {supervisor.broker.bootstrap_servers}")
        while not stop.event.wait(1.0):
            supervisor.check()
    finally:
        supervisor.stop()
        forget_run(settings.state_dir)


# -- inside


def _with_broker(settings: Settings) -> Settings:
    """The settings, with the brokers of the state directory's run where none are named."""
    if brokers := settings.brokers:
        check_broker(brokers)
        return settings
    other = active_run(settings.state_dir)
    if other is None:
        raise ConfigurationError(
            problem="no broker: none is named, and none runs in the state directory",
            fix="Give --bootstrap-servers, or start ray-pipeline broker with the same --state-dir",
        )
    check_broker(brokers_of(other, settings), starting=True)
    return settings.model_copy(update={"bootstrap_servers": other.bootstrap, **_in_clear(other)})


def _in_clear(run: RunInfo) -> dict[str, Any]:
    """What to change in settings for an embedded broker, where they say how brokers of somebody else are spoken to."""
    fields = SECURITY_FIELDS if "broker" in run.stages else ()
    return {name: Settings.model_fields[name].default for name in fields}


def _joining(settings: Settings) -> Settings:
    """For a stage that follows a stream: with its brokers, and its number of partitions where nobody says another."""
    settings = _with_broker(settings)
    if "partitions" in settings.model_fields_set:
        return settings
    assert settings.brokers is not None
    there = partitions_of(settings.brokers, [settings.ratings_topic])
    return settings.model_copy(update={"partitions": there.get(settings.ratings_topic, settings.partitions)})


def _run(
    settings: Settings,
    stages: tuple[str, ...],
    summary_json: Path | None,
    beside: Callable[[Settings, str, threading.Event], None] | None = None,
) -> None:
    if settings.sink != "kafka":
        _write(settings, summary_json)
        return
    faulthandler.enable()
    stop = StopSignal()
    stop.install()
    pipeline = Pipeline(settings, stages=stages, on_event=say, before_s=_process_age_s())
    try:
        with pipeline:
            stop.started()
            _announce(pipeline, stages)
            if beside is not None:
                threading.Thread(
                    target=beside, args=(settings, pipeline.bootstrap_servers, stop.event), daemon=True
                ).start()
            pipeline.wait(stop.event, _StatusLine(stages))
            # what other generators send may never end: only our own run is waited for
            pipeline.stop(drain="generate" in stages)
    except KeyboardInterrupt:
        say("stopped while starting")
    if "generate" in stages:
        _report(pipeline.stop(drain=False).as_dict(), summary_json)


def _process_age_s() -> float:
    """Seconds since this process began."""
    try:
        said = Path("/proc/self/stat").read_text()  # psutil knows it to a second only
    except OSError:
        return time.time() - psutil.Process().create_time()
    ticks = int(said.rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _write(settings: Settings, summary_json: Path | None) -> None:
    """Ratings to a file or a pipe, by this process alone."""
    piped = settings.sink == "stdout"
    stop = StopSignal(to_stderr=piped)
    stop.install()
    stop.started()
    try:
        summary = write_ratings(settings, sys.stdout.buffer, stop.event)
    finally:
        if piped:  # what Python held back for a pipe without a reader would fail once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _report(summary.as_dict(), summary_json, to_stderr=piped)


def _announce(pipeline: Pipeline, stages: tuple[str, ...]) -> None:
    say("stages: " + ", ".join(f"{name} {seconds:g} s" for name, seconds in pipeline.timings.items()))
    names = {"ui": "dashboard", "api": "API"}
    for name, url in sorted(pipeline.urls.items(), reverse=True):
        say(f"{names[name]}: {told(url, getattr(pipeline.settings, f'{name}_host'))}")
    say(f"Kafka: {pipeline.bootstrap_servers}")
    if "serve" in stages:
        say(f"control token: {pipeline.settings.control_token}")


class _StatusLine:
    """Prints a line every few seconds."""

    def __init__(self, stages: tuple[str, ...]) -> None:
        self._stages = stages
        self._last_s = time.monotonic()

    def __call__(self, status: Status) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s < _STATUS_EVERY_S:
            return
        self._last_s = now_s
        parts = [status.state]
        if "generate" in self._stages:
            parts.append(
                f"target {status.target_rate:g}/s, delivered {status.delivered_rate:,.1f}/s ({status.delivered:,})"
            )
            if status.state == "backfilling" and status.event_reached_ms is not None:
                parts.append(f"event time {iso_ms(status.event_reached_ms)}")
            elif status.behind_s >= 1:
                parts.append(f"behind by {status.behind_s:.1f} s")
        if "process" in self._stages:
            parts.append(f"windows {status.windows}, lag {status.lag:,}, batch {status.batch_ms} ms")
        if status.verified is not None and "verify" in self._stages:
            parts.append(f"verified {status.verified:,}, wrong {status.wrong:,}")
        say(" | ".join(parts))


def _print_windows(settings: Settings, bootstrap: str, stop: threading.Event) -> None:
    order = {spec.name: n for n, spec in enumerate(window_specs(settings))}
    typer.echo(f"{'window_start':<24}  {'window_end':<24}  {'window_type':<20}  {'count':>10}  avg_rating")
    for records in follow(bootstrap, [settings.metrics_topic], True, stop):
        newest: dict[str, dict[str, Any]] = {
            record.key: json.loads(record.value)
            for record in records
            if record.key is not None and record.value is not None and record.key.endswith("|total")
        }
        for window in sorted(newest.values(), key=lambda w: (order.get(w["window_type"], 9), w["window_start"])):
            typer.echo(
                f"{window['window_start']}  {window['window_end']}  {window['window_type']:<20}  "
                f"{window['count']:>10}  {window['avg_rating']:.4f}"
            )


def _report(summary: dict[str, Any], file: Path | None, to_stderr: bool = False) -> None:
    _print_summary(summary, to_stderr)
    if file is not None:
        write_file(file, json.dumps(summary, indent=2) + "\n", "summary", _SUMMARY)


def _print_summary(summary: dict[str, Any], to_stderr: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Summary", show_header=False)
    for name, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {seconds:g} s" for part, seconds in value.items())
        elif isinstance(value, int):
            value = f"{value:,}"
        table.add_row(name, "–" if value is None else str(value))
    Console(stderr=to_stderr).print(table)
