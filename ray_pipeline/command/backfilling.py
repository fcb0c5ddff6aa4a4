"""The command that has history made by a Spark job."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ray_pipeline.command.options import BROKER, JSON, TOPICS, emit_json, with_settings
from ray_pipeline.command.sparkjob import Ask, runs, spark_job
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError, ProcessingError
from ray_pipeline.history.parquet import ParquetOrder
from ray_pipeline.state import broker_for_reading

__all__ = ["backfill"]

_POLL_S = 0.3
_LINE_EVERY_S = 3.0
_ANSWER_S = 60.0


@with_settings(*BROKER, *TOPICS, "catalog", "model", "partitions", "ray_address", "fair_scheduler_file")
def backfill(
    settings: Settings,
    events: Annotated[int, typer.Option("--events", min=1, help="how many ratings, over all partitions")],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="ratings|URI", help="the ratings topic, or a Hadoop URI of a folder that is not there yet"
        ),
    ],
    tasks: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Spark tasks  [default: as suits]", show_default=False)
    ] = None,
    as_json: JSON = False,
) -> None:
    """Make history as a Spark job: record for record what the actors send, in the FAIR pool generator of the running pipeline.

    To the ratings topic: its next ratings, at any speed; the live stream goes on behind them. To a URI: the first ratings of the
    run, also when no pipeline runs any more.
    """
    order = _order(settings, events, to, tasks)
    began = time.monotonic()
    with spark_job(settings) as ask:
        ask("start_history", order, timeout_s=_ANSWER_S)
        status = _follow(ask)
    found = {
        "to": to,
        "events": status["done"],
        "pool": status["pool"],
        "duration_s": round(time.monotonic() - began, 1),
    }
    if as_json:
        emit_json(found)
    else:
        typer.echo(f"{found['events']:,} ratings in {to} ({found['duration_s']:g} s)")


def _order(settings: Settings, events: int, to: str, tasks: int | None) -> ParquetOrder | int:
    if to == settings.ratings_topic:
        if tasks is not None:
            raise ConfigurationError(
                problem="--tasks goes with Parquet: a partition of the topic is one task's", fix="Drop it"
            )
        if not runs(settings):
            raise ConfigurationError(
                problem=f"no Spark job runs in the state directory {settings.state_dir}, beside a generator",
                fix="Name its --state-dir or --ray-address, or start both with: ray-pipeline run --backfill N",
            )
        return events
    if ":" not in to:
        raise ConfigurationError(
            problem=f"--to {to} is neither the topic {settings.ratings_topic} nor a URI",
            fix="Such as --to file:///data/history",
        )
    from ray_pipeline.verification.history import parquet_order

    with broker_for_reading(settings) as bootstrap:
        return parquet_order(settings, bootstrap, events, to, tasks)


def _follow(ask: Ask) -> dict[str, Any]:
    """Show how far the job is until it has ended.

    Raises:
        RayPipelineError: what it failed with.
    """
    try:
        with _shown() as show:
            while True:
                status: dict[str, Any] = ask("history_status", timeout_s=_ANSWER_S)
                show(status)
                if status["state"] != "running":
                    break
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        ask("cancel_history", timeout_s=_ANSWER_S)
        raise ProcessingError(problem="the backfill was cancelled") from None
    if status["error"] is not None:
        raise status["error"]
    if status["state"] != "done":
        raise ProcessingError(problem=f"the backfill {status['state']}: {status['reason']}")
    return status


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[dict[str, Any]], None]]:
    """On the error output, so that the output can be read by a program: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("ratings"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda status: bar.update(task, completed=status["done"], total=status["total"])
        return
    last_s = time.monotonic()

    def line(status: dict[str, Any]) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= _LINE_EVERY_S:
            last_s = time.monotonic()
            typer.echo(f"{status['done']:,} of {status['total']:,} ratings", err=True)

    yield line
