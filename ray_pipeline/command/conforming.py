"""The command that judges the stream against every declared setting."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ray_pipeline.command.options import BROKER, GENERATOR, JSON, emit_json, with_settings
from ray_pipeline.command.results import require_file, write_file
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.state import broker_for_reading

if TYPE_CHECKING:
    from ray_pipeline.conformance.evidence import Evidence
    from ray_pipeline.conformance.judge import ConformanceReport

__all__ = ["conformance"]

_EXIT_CODES = {"conforms": 0, "deviates": 1, "unchecked": 2}
_EVENTS = 1_000_000
_READ_MOST = 5_000_000


@with_settings(*GENERATOR, *BROKER)
def conformance(
    settings: Settings,
    events: Annotated[
        int | None,
        typer.Option(min=1, max=100_000_000, help=f"make so many ratings, without Kafka  [default: {_EVENTS:,}]"),
    ] = None,
    topic: Annotated[
        str | None,
        typer.Option(help=f"read what lies in this topic, at most {_READ_MOST:,} ratings, in place of making some"),
    ] = None,
    as_json: JSON = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="write a page with charts there, HTML")
    ] = None,
) -> None:
    """Judge the emitted ratings against every declared setting: estimate, interval, verdict.

    Ends with 0 when all conform, 1 when some deviate, 2 when it could not be checked.
    """
    if events is not None and topic is not None:
        raise ConfigurationError(problem="--events and --topic exclude each other", fix="Give one of them")
    from ray_pipeline.conformance.judge import judge

    if report is not None:
        require_file(report, "--report")
    began = time.monotonic()
    evidence = _made(settings, events) if topic is None else _read(settings, topic)
    found = judge(evidence, "made anew" if topic is None else f"read from topic {topic}")
    found.duration_s = round(time.monotonic() - began, 3)
    if as_json:
        emit_json(found.as_dict())
    else:
        _print(found)
    if report is not None:
        from ray_pipeline.conformance.page import render_page

        write_file(report, render_page(evidence, found), "report", "--report")
    raise typer.Exit(_EXIT_CODES[found.verdict])


def _made(settings: Settings, events: int | None) -> Evidence:
    from ray_pipeline.conformance.evidence import Evidence
    from ray_pipeline.conformance.sample import regenerate
    from ray_pipeline.conformance.world import World

    world = World(settings)
    return Evidence(regenerate(world, events, _EVENTS), world)


def _read(settings: Settings, topic: str) -> Evidence:
    from ray_pipeline.conformance.evidence import Evidence
    from ray_pipeline.verification.conformance import read_sample

    with broker_for_reading(settings) as bootstrap:
        sample = read_sample(settings.model_copy(update={"ratings_topic": topic}), bootstrap, _READ_MOST)
    return Evidence(sample, sample.source)


def _print(found: ConformanceReport) -> None:
    from ray_pipeline.conformance.page import number

    numbers = [Column(name, justify="right", no_wrap=True) for name in ("declared", "estimate", "interval")]
    table = Table(Column("check", no_wrap=True), *numbers, Column("verdict", no_wrap=True), box=None)
    for row in found.checks:
        interval = "" if row.low is None or row.high is None else f"{number(row.low)} … {number(row.high)}"
        style = {"deviates": "bold red", "unchecked": "dim"}.get(row.verdict, "")
        table.add_row(row.name, number(row.declared), number(row.estimate), interval, row.verdict, style=style)
    Console().print(table)
    for row in found.checks:
        if row.verdict == "deviates":
            typer.echo(f"{row.name}: judges {', '.join(row.settings)} by {row.statistic}")
        elif row.reason:
            typer.echo(f"{row.name}: {row.reason}")
    unreadable = f", {found.unreadable:,} records that are no rating" if found.unreadable else ""
    typer.echo(f"{found.events:,} ratings, {found.source}{unreadable}: {found.verdict} ({found.duration_s:.1f} s)")
