"""The command that tests a pipeline by breaking it."""

from __future__ import annotations

import functools
import ipaddress
import json
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_pipeline.chaos.child import ChildRun
from ray_pipeline.chaos.inject import Injector
from ray_pipeline.chaos.observer import Observer
from ray_pipeline.chaos.plan import KINDS, OF_OWN, Fault, Kind, parse_kinds, plan
from ray_pipeline.chaos.report import StormReport, as_table
from ray_pipeline.chaos.storm import Storm
from ray_pipeline.chaos.victims import ProcessTree
from ray_pipeline.clock import SystemClock
from ray_pipeline.command.options import STATE, TOPICS, with_settings
from ray_pipeline.command.results import require_file, write_file
from ray_pipeline.command.running import say
from ray_pipeline.command.terminal import take_terminal
from ray_pipeline.config import Settings, flag_of
from ray_pipeline.errors import ConfigurationError, EnvironmentProblem, RayPipelineError
from ray_pipeline.state import RunInfo, active_run, broker_for_reading, brokers_of
from ray_pipeline.truth.audit import Finding
from ray_pipeline.verification.audit import AuditReport, audit

__all__ = ["chaos"]

_FAULTS_A_MINUTE = 60  # more than can happen: the time ends the storm, not the plan
_FAILED = 1
_UNCHECKED = 2
_REPORT = "--report"
_LONGEST_MIN = 7 * 24 * 60


_PLACES = "what a storm breaks is on this machine, and what it leaves in a folder of its own"
_ENDS = "a storm ends its pipeline itself"
_NOT_OF_OWN = {
    "plan": "a storm measures how soon the set rate is back",
    "duration_s": _ENDS,
    "ratings": _ENDS,
    "sink": "a storm reads back what is in Kafka",
    "bootstrap_servers": _PLACES,
    "security_protocol": _PLACES,
    "delivery": "a storm demands that no rating is there twice",
    "checkpoint": _PLACES,
    "archive": _PLACES,
    "ray_address": _PLACES,
}
"""Settings that the pipeline of ``--start`` cannot have, other than by default, and why."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the storm is asked for."""

    seed: int
    minutes: float
    faults: list[Fault]


@with_settings(*STATE, *TOPICS, "commit_interval_ms", "partitions", "catalog", "model", "movies", "delivery", "fast")
def chaos(
    settings: Settings,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.1, max=_LONGEST_MIN, help="how long faults are injected at most")
    ] = 5.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of the plan")] = 1,
    faults: Annotated[
        str | None,
        typer.Option("--faults", metavar="KIND,…", help=f"kinds of faults: {', '.join(KINDS)}  [default: all]"),
    ] = None,
    each: Annotated[
        int | None,
        typer.Option("--each", min=1, help="end after so many of each kind", show_default=False),
    ] = None,
    start: Annotated[
        bool, typer.Option("--start", help="start a pipeline for it, and end it; without: break the one that runs")
    ] = False,
    rate: Annotated[
        float, typer.Option("--rate", min=1, help="ratings per second of the pipeline that --start starts")
    ] = 200.0,
    report: Annotated[
        list[Path] | None,
        typer.Option(_REPORT, help="write the report to this file: as JSON, or *.md as a table; may be given again"),
    ] = None,
) -> None:
    """Kill, stop and change parts of a pipeline on this machine by a seeded plan, and say what became of the stream.

    Exit code 0: it recovered from everything, every record and window is right; 1: it did not, or one is wrong; 2: it could not be
    checked, or nothing was done.
    """
    kinds = _kinds(faults, start)
    if start:
        _require_for_own(settings)
    for file in report or ():
        require_file(file, _REPORT)
    count = int(minutes * _FAULTS_A_MINUTE) + 1 if each is None else each * len(kinds)
    wanted = _Wanted(seed, minutes, plan(seed, count, kinds, evenly=each is not None))
    stop = _on_signals()
    made = _storm_of_own(settings, wanted, rate, stop) if start else _storm_outside(settings, wanted, stop)
    found = made.as_dict()
    typer.echo(as_table(found))
    for finding in (found["audit"] or {}).get("findings", ()):
        typer.echo(f"finding: {Finding(**finding)}")
    if made.reason:
        typer.echo(f"{made.verdict}: {made.reason}", err=True)
    _write(found, report or ())
    raise typer.Exit({"survived": 0, "failed": _FAILED}.get(made.verdict, _UNCHECKED))


def _write(found: dict[str, Any], files: Iterable[Path]) -> None:
    """Write the report to all files that can be written.

    Raises:
        EnvironmentProblem: one cannot.
    """
    failed: EnvironmentProblem | None = None
    for file in files:
        table = f"# A fault storm\n\n{as_table(found)}"
        text = table if file.suffix == ".md" else json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        try:
            write_file(file, text, "report", _REPORT)
        except EnvironmentProblem as error:
            failed = failed or error
    if failed is not None:
        raise failed


def _kinds(text: str | None, start: bool) -> tuple[Kind, ...]:
    try:
        kinds = parse_kinds(text)
    except ValueError as error:
        raise ConfigurationError(problem=f"--faults: {error}", fix=f"The kinds are: {', '.join(KINDS)}") from None
    found = tuple(kind for kind in kinds if start or kind not in OF_OWN)
    if text is not None and len(found) < len(kinds):
        raise ConfigurationError(
            problem=f"--faults: {' and '.join(OF_OWN)} end the run, and only who started it can start it again",
            fix="Give --start, or leave them out",
        )
    return found


def _require_for_own(settings: Settings) -> None:
    """Refuse settings with which a storm's own pipeline would be none, or would reach what is not the storm's."""
    for name, why in _NOT_OF_OWN.items():
        value = getattr(settings, name)
        if value != Settings.model_fields[name].default:
            raise ConfigurationError(
                problem=f"{name}={value} does not go with --start: {why}",
                fix=f"Leave {name} out ({flag_of(name)}, environment, file and preset)",
            )


def _on_signals() -> threading.Event:
    """Set by Ctrl-C and SIGTERM, so that whatever stands still is let go on first."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    take_terminal()
    return stop


def _storm_of_own(settings: Settings, wanted: _Wanted, rate: float, stop: threading.Event) -> StormReport:
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    state_dir = Path(tempfile.mkdtemp(prefix="chaos-", dir=settings.state_dir))
    child, ended = ChildRun(settings, state_dir, rate, wanted.seed), ""
    say("starting a pipeline")
    try:
        with _storm(child.settings, child.start(), wanted, stop, child) as storm:
            pass
    finally:
        say("ending the pipeline")
        try:
            child.end()
        except RayPipelineError as error:
            ended = str(error)
    say("checking every record and window")
    try:
        with broker_for_reading(child.settings) as bootstrap:
            found = audit(child.settings, bootstrap)
    except RayPipelineError as error:
        found = AuditReport(reason=str(error))
    made = _report(storm, wanted, found.as_dict(), ended, child.conditions)
    if made.verdict == "survived":
        shutil.rmtree(state_dir)
    else:
        say(f"what the pipeline left is kept in {state_dir}")
    return made


def _storm_outside(settings: Settings, wanted: _Wanted, stop: threading.Event) -> StormReport:
    run = active_run(settings.state_dir, "generate")
    if run is None or "generate" not in run.stages:
        raise ConfigurationError(
            problem=f"no pipeline runs in the state directory {settings.state_dir}",
            fix="Start ray-pipeline run, name its --state-dir, or give --start",
        )
    bootstrap = brokers_of(run, settings)
    found, ended = None, ""
    with _storm(settings, run, wanted, stop) as storm:
        if not storm.aborted:
            say("pausing the pipeline and checking every record and window")
            try:
                with storm.at_rest():
                    found = audit(settings, bootstrap).as_dict()
            except RayPipelineError as error:
                ended = str(error)
    return _report(storm, wanted, found, ended)


@contextmanager
def _storm(
    settings: Settings,
    run: RunInfo,
    wanted: _Wanted,
    stop: threading.Event,
    child: ChildRun | None = None,
) -> Iterator[Storm]:
    """A storm that has passed; the pipeline is still watched."""
    bootstrap = brokers_of(run, settings)
    _require_loopback(bootstrap)
    clock = SystemClock()
    observer = Observer(settings, bootstrap, clock)
    observer.start()
    try:
        generator = observer.record("generator")
        if generator.get("plan") is not None:
            raise ConfigurationError(
                problem="a storm measures how soon the set rate is back, and this pipeline follows a rate plan",
                fix="Give it a constant rate first, such as: ray-pipeline rate 100",
            )
        rate = float(generator["target_rate"])
        tree = ProcessTree(run.pid, run.process_started)
        injector = Injector(settings, bootstrap, tree, observer, clock, rate, stop, child)
        # one process: the pipeline needs the other cores
        audit_so_far = functools.partial(audit, settings, bootstrap, processes=1)
        storm = Storm(injector, observer, audit_so_far, clock, say, stop)
        storm.run(wanted.faults, wanted.minutes * 60)
        yield storm
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
    storm: Storm, wanted: _Wanted, found: dict[str, Any] | None, ended: str, conditions: str = ""
) -> StormReport:
    return StormReport(
        wanted.seed,
        storm.duration_s,
        storm.rate,
        tuple(storm.outcomes),
        storm.memory.slopes(),
        storm.restarts,
        found,
        storm.aborted or ended,
        storm.windows,
        conditions,
        tuple(storm.audits),
    )
