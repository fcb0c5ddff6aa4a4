"""The command that tests a pipeline by breaking it."""

from __future__ import annotations

import ipaddress
import json
import logging
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_pipeline.chaos.child import ChildRun
from ray_pipeline.chaos.inject import Injector
from ray_pipeline.chaos.observer import Observer
from ray_pipeline.chaos.plan import KINDS, Kind, parse_kinds, plan
from ray_pipeline.chaos.report import StormReport, as_table
from ray_pipeline.chaos.storm import Storm
from ray_pipeline.chaos.victims import ProcessTree
from ray_pipeline.clock import SystemClock
from ray_pipeline.command.options import STATE, with_settings
from ray_pipeline.command.running import say
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError, RayPipelineError
from ray_pipeline.state import RunInfo, active_run, broker_for_reading
from ray_pipeline.verification.audit import audit

__all__ = ["chaos"]

_FAULTS_A_MINUTE = 60  # more than can happen: the time ends the storm, not the plan
_FAILED = 1
_UNCHECKED = 2


@with_settings(*STATE, "commit_interval_ms", "partitions")
def chaos(
    settings: Settings,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="how long faults are injected")] = 5.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of the plan")] = 1,
    faults: Annotated[
        str | None, typer.Option("--faults", help=f"kinds of faults, comma-separated: {','.join(KINDS)}")
    ] = None,
    start: Annotated[
        bool, typer.Option("--start", help="start a pipeline for it, end it, and check every record and window")
    ] = False,
    rate: Annotated[float, typer.Option("--rate", help="ratings per second of the pipeline that --start starts")] = 200,
    report: Annotated[Path | None, typer.Option("--report", help="write the report to this file as JSON")] = None,
) -> None:
    """Kill, stop and change parts of a pipeline on this machine by a seeded plan, and say what became of the stream.

    Against the pipeline that runs in the state directory, or with --start one of its own. Exit code 0: it survived, every record
    and window right; 1: it did not; 2: it could not be checked.
    """
    kinds = _kinds(faults)
    # that brokers go away is what is done here
    logging.getLogger("ray_pipeline.kafka.librdkafka").setLevel(logging.CRITICAL)
    stop = _on_signals()
    made = (
        _storm_of_own(settings, kinds, seed, minutes, rate, stop)
        if start
        else _storm_outside(settings, kinds, seed, minutes, stop)
    )
    found = made.as_dict()
    if report is not None:
        report.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    typer.echo(as_table(found))
    for finding in (found["audit"] or {}).get("findings", ()):
        typer.echo(f"finding: {json.dumps(finding)}")
    if made.aborted:
        typer.echo(f"ended early: {made.aborted}", err=True)
    raise typer.Exit({"survived": 0, "failed": _FAILED}.get(made.verdict, _UNCHECKED))


def _kinds(text: str | None) -> tuple[Kind, ...]:
    try:
        return parse_kinds(text)
    except ValueError as error:
        raise ConfigurationError(problem=f"--faults: {error}", fix=f"The kinds are: {', '.join(KINDS)}") from None


def _on_signals() -> threading.Event:
    """Set by Ctrl-C and SIGTERM, so that whatever stands still is let go on first."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _storm_of_own(
    settings: Settings, kinds: tuple[Kind, ...], seed: int, minutes: float, rate: float, stop: threading.Event
) -> StormReport:
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    state_dir = Path(tempfile.mkdtemp(prefix="chaos-", dir=settings.state_dir))
    child, ended = ChildRun(state_dir, rate, seed), ""
    settings = child.settings
    say("starting a pipeline")
    try:
        storm, seconds = _storm(settings, child.start(), kinds, seed, minutes, stop)
    finally:
        say("ending the pipeline")
        try:
            child.end()
        except RayPipelineError as error:
            ended = str(error)
    say("checking every record and window")
    with broker_for_reading(settings) as bootstrap:
        found = audit(settings, bootstrap).as_dict()
    made = _report(storm, seed, seconds, rate, found, ended)
    if made.verdict == "survived":
        shutil.rmtree(state_dir)
    else:
        say(f"what the pipeline left is kept in {state_dir}")
    return made


def _storm_outside(
    settings: Settings, kinds: tuple[Kind, ...], seed: int, minutes: float, stop: threading.Event
) -> StormReport:
    run = active_run(settings.state_dir)
    if run is None or "generate" not in run.stages:
        raise ConfigurationError(
            problem=f"no pipeline runs in the state directory {settings.state_dir}",
            fix="Start ray-pipeline run, name its --state-dir, or give --start",
        )
    storm, seconds = _storm(settings, run, kinds, seed, minutes, stop)
    return _report(storm, seed, seconds, storm.rate, None, "")


def _storm(
    settings: Settings, run: RunInfo, kinds: tuple[Kind, ...], seed: int, minutes: float, stop: threading.Event
) -> tuple[Storm, float]:
    _require_loopback(run.bootstrap)
    clock = SystemClock()
    observer = Observer(settings, run.bootstrap, clock)
    observer.start()
    try:
        rate = float(observer.record("generator")["target_rate"])
        tree = ProcessTree(run.pid, run.process_started)
        injector = Injector(settings, run.bootstrap, tree, observer, clock, rate, stop)
        storm = Storm(injector, observer, clock, say, stop)
        began = time.monotonic()
        storm.run(plan(seed, int(minutes * _FAULTS_A_MINUTE) + 1, kinds), minutes * 60)
        return storm, time.monotonic() - began
    finally:
        observer.stop()


def _require_loopback(bootstrap: str) -> None:
    """Refuse brokers of another machine: the processes would not be here, and the faults are somebody's data."""
    for place in bootstrap.split(","):
        host = place.rpartition(":")[0].strip("[]")
        try:
            local = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = False
        if not local:
            raise ConfigurationError(
                problem=f"the pipeline's broker {place} is not on this machine's loopback address",
                fix="Run chaos against a pipeline with an embedded broker, or give --start",
            )


def _report(
    storm: Storm, seed: int, seconds: float, rate: float, found: dict[str, Any] | None, ended: str
) -> StormReport:
    return StormReport(seed, seconds, rate, tuple(storm.outcomes), storm.memory.slopes(), found, storm.aborted or ended)
