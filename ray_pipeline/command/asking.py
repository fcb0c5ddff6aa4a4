"""Commands that ask or tell a pipeline something, while it runs or after."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ray_pipeline import doctor
from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.cluster.token import present_token
from ray_pipeline.command.followers import FOLLOWERS, followers
from ray_pipeline.command.options import (
    BROKER,
    FORMAT,
    GENERATOR,
    JSON,
    NAMED_BROKER,
    PROCESSOR,
    SERVING,
    STATE,
    TOPICS,
    emit_json,
    with_settings,
)
from ray_pipeline.command.sparkjob import ray_address, spark_job
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError, EnvironmentProblem, StageFailedError
from ray_pipeline.kafka.client import check_broker
from ray_pipeline.kafka.control import send_command
from ray_pipeline.kafka.read import Record, count_records, newest_of_key, newest_records, newest_since, tail
from ray_pipeline.kafka.topics import delete_topics, partitions_of
from ray_pipeline.metrics.records import UnreadableRecord, read_expected, read_job, read_oracle, read_window
from ray_pipeline.metrics.verdicts import Verdicts, difference_text
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.rates.language import parse_plan
from ray_pipeline.state import active_run, active_runs, broker_for_reading, broker_kept_out, brokers_of
from ray_pipeline.verification.scoring import score_all
from ray_pipeline.windows.spec import epoch_ms, iso_ms

__all__ = [
    "batch",
    "doctor_command",
    "jobs",
    "pause",
    "plan",
    "rate",
    "reset",
    "resume",
    "scale",
    "scoreboard",
    "status",
    "topics",
]

_ANSWER_S = 10.0
_SCALE_S = 120.0
_STOP_S = 120.0
_LIVE_MS = 15_000
_BATCH_S = 600.0
_READ_S = 600.0
_WINDOWS_SHOWN = 8
_SILENT_S = 10.0
_LISTEN_EVERY_S = 0.5

topics = typer.Typer(no_args_is_help=True, help="Look into topics.")
jobs = typer.Typer(no_args_is_help=True, help="Pipelines and Spark queries on a Ray cluster.")

_CONTROL = (*BROKER, "control_topic", "progress_topic")
_REPORTED = ("ratings_topic", "max_ahead_s", *FORMAT)
"""What a batch report reads, and how."""
_CATALOGUE = ("catalog", "model", "movies")
_console = Console()


# -- control


@with_settings(*_CONTROL)
def rate(
    settings: Settings,
    ratings_per_second: Annotated[
        str, typer.Argument(metavar="RATE", help="ratings per second; fractions allowed: 0.2")
    ],
    as_json: JSON = False,
) -> None:
    """Change the target rate of a running pipeline."""
    try:
        wanted = float(ratings_per_second)
    except ValueError:
        wanted = 0.0
    if not 0 < wanted <= 1e9:
        raise ConfigurationError(
            problem=f"rate {ratings_per_second!r} is not a number above 0",
            fix="Give ratings per second, such as 250 or 0.2",
        )
    _say(_send(settings, "rate", rate=wanted), as_json)


@with_settings(*_CONTROL)
def plan(
    settings: Settings,
    text: Annotated[str, typer.Argument(metavar="PLAN", help="rates over time, such as 'ramp(0..500, 10m) then 500'")],
    as_json: JSON = False,
) -> None:
    """Have a running pipeline follow another rate plan from now on."""
    parse_plan(text)
    _say(_send(settings, "plan", plan=text), as_json)


@with_settings(*_CONTROL)
def pause(settings: Settings, as_json: JSON = False) -> None:
    """Have a running pipeline send nothing until it is resumed."""
    _say(_send(settings, "pause"), as_json)


@with_settings(*_CONTROL)
def resume(settings: Settings, as_json: JSON = False) -> None:
    """Have a paused pipeline go on at its target rate."""
    _say(_send(settings, "resume"), as_json)


@with_settings(*_CONTROL)
def scale(
    settings: Settings,
    actors: Annotated[int, typer.Argument(metavar="ACTORS", min=1, help="generator actors; at most one a partition")],
    as_json: JSON = False,
) -> None:
    """Have a running generator go on with another number of actors, without a gap or a repeat."""
    _say(_send(settings, "scale", actors=actors, answer_s=_SCALE_S), as_json)


def _send(
    settings: Settings,
    command: str,
    rate: float | None = None,
    actors: int | None = None,
    answer_s: float = _ANSWER_S,
    plan: str | None = None,
) -> dict[str, Any]:
    """Send a command and wait for the generator's answer.

    Raises:
        ConfigurationError: the generator refused it.
        StageFailedError: it did not answer in time.
    """
    bootstrap = _running_broker(settings)
    identity = send_command(bootstrap, settings.control_topic, command, rate, actors=actors, plan=plan)
    deadline = time.monotonic() + answer_s
    while time.monotonic() < deadline:
        said = _newest(settings, bootstrap, settings.progress_topic, "generator")
        refusal = said.get("answers", {}).get(identity)
        if refusal:
            raise ConfigurationError(problem=refusal)
        if refusal is not None:
            return {"id": identity, "command": command, **said}
        time.sleep(0.1)
    raise StageFailedError(
        problem=f"no generator has answered within {answer_s:.0f} s", fix="Check that one runs on these brokers"
    )


def _say(said: dict[str, Any], as_json: bool) -> None:
    actors = len(said["actors"])
    if as_json:
        emit_json(
            {**{name: said[name] for name in ("id", "command", "state", "target_rate", "plan")}, "actors": actors}
        )
    else:
        following = f", plan {said['plan']}" if said["plan"] else ""
        typer.echo(f"{said['state']}, target rate {said['target_rate']:g}/s{following}, {actors} actors")


# -- topics


@topics.command("count")
@with_settings(*BROKER)
def topics_count(
    settings: Settings,
    topic: Annotated[str, typer.Argument(help="topic, such as ratings")],
    as_json: JSON = False,
) -> None:
    """Count the data records of a topic; markers of transactions do not count."""
    with broker_for_reading(settings) as bootstrap:
        count = count_records(bootstrap, topic)
    if as_json:
        emit_json(
            {"topic": topic, "total": count.total, "partitions": {str(p): n for p, n in count.partitions.items()}}
        )
        return
    for partition, n in sorted(count.partitions.items()):
        typer.echo(f"partition {partition}: {n}")
    typer.echo(f"Total: {count.total}")


@topics.command("tail")
@with_settings(*BROKER)
def topics_tail(
    settings: Settings,
    topic: Annotated[str, typer.Argument(help="topic, such as ratings")],
    number: Annotated[int, typer.Option("-n", min=1, max=100_000, help="how many records")] = 10,
    as_json: JSON = False,
) -> None:
    """Print the last records of a topic, each value as it is, one a line."""
    with broker_for_reading(settings) as bootstrap:
        records = tail(bootstrap, topic, number)
    if as_json:
        emit_json(
            [
                {
                    "partition": r.partition,
                    "offset": r.offset,
                    "timestamp_ms": r.timestamp_ms,
                    "key": r.key,
                    "value": None if r.value is None else r.value.decode(errors="replace"),
                }
                for r in records
            ]
        )
        return
    for record in records:
        typer.echo(record.value or b"")


# -- status and jobs


@with_settings(*BROKER, "progress_topic", "job_topic", "metrics_topic", "expected_topic")
def status(settings: Settings, as_json: JSON = False) -> None:
    """Show cluster, who holds it, generator, Spark job and queries of the pipelines that run on a broker."""
    bootstrap = _running_broker(settings)
    found: dict[str, Any] = {
        "bootstrap_servers": bootstrap,
        "pipelines": _pipelines(settings, bootstrap),
        "generator": _newest(settings, bootstrap, settings.progress_topic, "generator"),
        "job": _newest(settings, bootstrap, settings.job_topic, "job"),
        "windows": _verdicts(settings, bootstrap),
    }
    if as_json:
        emit_json(found)
        return
    generator, job = found["generator"], found["job"]
    for pipeline in found["pipelines"]:
        _print_pipeline(pipeline)
    if generator:
        typer.echo(
            f"Generator: {generator['state']}, target {generator['plan_rate']:g}/s, {generator['delivered']:,} delivered, "
            f"{_pace(generator)}, {len(generator['actors'])} actors, {generator['restarts']} restarts"
        )
    if job:
        _print_job(job)
    if found["windows"]:
        _print_verdicts(found["windows"])


def _pipelines(settings: Settings, bootstrap: str) -> list[dict[str, Any]]:
    """The records of the pipelines that run: each writes one every two seconds, and takes it back at its end."""
    since_ms = time.time_ns() // 1_000_000 - _LIVE_MS
    found = newest_since(bootstrap, settings.progress_topic, "pipeline/", since_ms, 15.0)
    return [record for _, record in sorted(found.items())]


def _print_pipeline(pipeline: dict[str, Any]) -> None:
    cluster = pipeline["cluster"]
    typer.echo(f"Pipeline {pipeline['name']}: {', '.join(pipeline['stages'])}; process {pipeline['pid']}")
    typer.echo(
        f"Cluster: {cluster['nodes']} node(s), {cluster['cpus_free']:g} of {cluster['cpus']:g} CPUs free, "
        f"{cluster['memory_free_bytes'] / 2**30:.1f} of {cluster['memory_bytes'] / 2**30:.1f} GiB free"
    )
    table = Table("holder", "CPUs", "memory, MiB", "processes")
    for holder in pipeline["holders"]:
        memory = "–" if holder["memory_bytes"] is None else f"{holder['memory_bytes'] / 2**20:,.0f}"
        table.add_row(holder["who"], f"{holder['cpus']:g}", memory, str(holder["processes"]))
    _console.print(table)
    for name, url in pipeline["urls"].items():
        typer.echo(f"{name}: {url}")


def _pace(generator: dict[str, Any]) -> str:
    if generator["state"] == "backfilling":
        return f"event time {iso_ms(generator['event_reached_ms'])} reached"
    return f"behind by {generator['behind_s']:.1f} s"


def _verdicts(settings: Settings, bootstrap: str) -> dict[str, Any]:
    """Every window beside what it must hold, as health has it at the moment in which the reading begins.

    Where job and oracle were some seconds before is in their older records. Where the broker has just compacted these, a window that
    nobody expects is pending for some seconds more.
    """
    verdicts, now_ms = Verdicts(), time.time_ns() // 1_000_000
    windows: dict[str, dict[str, Any]] = {}

    def oracle(record: Record) -> None:
        if record.key == "oracle" and record.value is not None:
            with contextlib.suppress(UnreadableRecord):
                said = read_oracle(record.value)
                verdicts.oracle_at(said["batch"], min(said["updated_ms"], now_ms))

    def job(record: Record) -> None:
        if record.key == "job" and record.value is not None:
            with contextlib.suppress(UnreadableRecord):
                said = read_job(record.value)
                verdicts.job_at(said["batch"], said.get("watermark_ms"), min(said["updated_ms"], now_ms))

    expected = newest_records(bootstrap, settings.expected_topic, _READ_S, oracle)
    expected.pop("oracle", None)
    for key, found in expected.items():
        try:
            windows[key] = read_expected(key, found.value or b"")
            verdicts.expect(windows[key])
        except UnreadableRecord as error:
            verdicts.no_expected(key, str(error))
    for key, found in newest_records(bootstrap, settings.metrics_topic, _READ_S).items():
        try:
            verdicts.actual(read_window(key, found.value or b""))
        except UnreadableRecord as error:
            verdicts.no_actual(key, str(error))
    newest_records(bootstrap, settings.job_topic, _READ_S, job)  # last: it says so after it has published windows
    newest = sorted(windows.values(), key=lambda r: (r["window_start"], r["window_type"]))[-_WINDOWS_SHOWN:]
    return {
        **asdict(verdicts.tally(now_ms)),
        "wrong_windows": verdicts.wrong(now_ms),
        "newest": [
            {name: record[name] for name in ("window_type", "window_start")}
            | verdicts.of(record["window_type"], epoch_ms(record["window_start"]), now_ms)
            for record in newest
        ],
    }


def _print_verdicts(windows: dict[str, Any]) -> None:
    typer.echo(
        f"Windows: {windows['verified']:,} verified, {windows['pending']:,} pending, {windows['late']:,} late by design, "
        f"{windows['wrong']:,} wrong, {windows['overdue']:,} overdue"
    )
    counts = [Column(name, no_wrap=True) for name in ("expected", "actual", "difference")]
    names = [Column(name, overflow="fold") for name in ("window", "from")]  # whole in a narrow terminal, too
    table = Table(*names, *counts, "verdict", "")
    for row in windows["newest"]:
        expected, actual = row["expected"], row["actual"]
        table.add_row(
            row["window_type"],
            row["window_start"],
            f"{expected['count']:,}" if expected else "–",
            f"{actual['count']:,}" if actual else "–",
            difference_text(row["difference"]),
            row["verdict"],
            row["reason"],
        )
    _console.print(table)
    for row in windows["wrong_windows"]:
        typer.echo(f"WRONG: {row['window_type']} from {row['window_start']} {row['reason']}")
    if windows["first_overdue"]:
        typer.echo(f"Overdue: {windows['first_overdue']}")


def _print_job(job: dict[str, Any]) -> None:
    typer.echo(
        f"Spark: {job['application']}, {job['executors']} of {job['executors_wanted']} executors alive, "
        f"FAIR pools (weight, minShare) "
        + ", ".join(f"{pool['name']} ({pool['weight']}, {pool['min_share']})" for pool in job["pools"])
    )
    table = Table("query", "state", "pool", "input rows/s", "batch ms", "lag", "dropped as late", "rejected")
    table.add_row(
        job["query"],
        job["state"],
        job["pool"] or "–",
        f"{job['input_rate']:,.0f}",
        str(job["batch_duration_ms"]),
        f"{job['lag']:,}",
        f"{job['late_dropped']:,}",
        f"{job['rejected']:,}",
    )
    _console.print(table)
    if job.get("reason"):
        typer.echo(f"Query {job['query']} is {job['state']}: {job['reason']}")
    if job.get("archive"):
        archive = job["archive"]
        typer.echo(
            f"Archive {archive['uri']}: {archive['ratings']:,} ratings since Spark's start {archive['reason']}".rstrip()
        )


@jobs.command("list")
@with_settings(*STATE, "ray_address")
def jobs_list(settings: Settings, as_json: JSON = False) -> None:
    """List the pipelines and Spark queries on a Ray cluster."""
    with _cluster(settings) as directory:
        rows = directory.pipelines()
    if as_json:
        emit_json(rows)
        return
    table = Table("name", "stages", "generator", "application", "query", "state", "batch", "input rows/s", "brokers")
    for row in rows:
        job = row["job"]
        table.add_row(
            row["name"],
            ", ".join(row["stages"]),
            str(row["generator"].get("state", "")),
            str(job.get("application", "")),
            str(job.get("query", "")),
            str(job.get("state", "")),
            str(job.get("batch", "")),
            f"{job['input_rate']:,.0f}" if "input_rate" in job else "",
            row["bootstrap_servers"],
        )
    _console.print(table)


@jobs.command("stop")
@with_settings(*STATE, "ray_address")
def jobs_stop(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="name, as jobs list shows it")],
    wait_s: Annotated[float, typer.Option("--wait", min=0, help="longest time to wait for its end, seconds")] = _STOP_S,
) -> None:
    """Stop a pipeline in order, and wait until it has ended."""
    with _cluster(settings) as directory:
        directory.stop_pipeline(name, wait_s)
    typer.echo(f"{name} has stopped")


@contextlib.contextmanager
def _cluster(settings: Settings) -> Iterator[Any]:
    """What finds pipelines on the cluster, which is joined for so long."""
    present_token()
    from ray_pipeline.cluster import directory

    with directory.joined_cluster(ray_address(settings)):
        yield directory


# -- scoreboard


@with_settings(*BROKER, "catalog", "model", "progress_topic", "predictions_topic", "scores_topic")
def scoreboard(settings: Settings, as_json: JSON = False) -> None:
    """Score learners' predictions against the truth, beside the best possible and two baselines.

    Reads all of topic predictions, while a pipeline runs or after it has ended.
    """
    with broker_for_reading(settings) as bootstrap:
        found = score_all(settings, bootstrap)
    if as_json:
        emit_json(found)
        return
    model = Column("model", no_wrap=True)
    table = Table(model, "scored", "coverage", "RMSE observed", "MAE observed", "RMSE truth", "MAE truth")
    for score in found["models"]:
        table.add_row(score["model"], f"{score['scored']:,}", f"{score['coverage']:.1%}", *_errors(score))
        about = "biases only, roughly" if score["bias_only"]["inexact_by"] else "biases only"
        for name, label in (("floor", "best possible"), ("bias_only", about), ("global_mean", "global mean")):
            table.add_row(f"  {label}", "", "", *_errors(score[name]), style="dim")
    _console.print(table)
    for score in found["models"]:
        counts = {name: score[name] for name in ("unmatched", "repeated", "attacked") if score[name]}
        if counts:
            typer.echo(f"{score['model']}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
        if score["bias_only"]["inexact_by"]:
            typer.echo(
                f"{score['model']}: biases only is roughly right, with {', '.join(score['bias_only']['inexact_by'])}"
            )
    for reason, count in found["rejected"].items():
        typer.echo(f"rejected: {count:,} × {reason}")
    if found["state"] == "failed":
        typer.echo(f"the run's scoreboard has failed: {found['reason']}")


def _errors(score: dict[str, Any]) -> list[str]:
    found = [score[against][kind] for against in ("observed", "truth") for kind in ("rmse", "mae")]
    return ["–" if error is None else f"{error:.4f}" for error in found]


# -- batch


@with_settings(*BROKER, "ray_address", "archive", "preset", *_REPORTED, *_CATALOGUE)
def batch(
    settings: Settings,
    as_json: JSON = False,
    from_archive: Annotated[
        bool, typer.Option("--from-archive", help="read the archive (--archive) in place of the topic")
    ] = False,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="DIR", help="write each table there as Parquet")
    ] = None,
) -> None:
    """Report on everything in the ratings topic, or in the archive: histogram, top movies by hour, genres.

    While a pipeline runs, as a job in its Spark application, in the FAIR pool batch, and on what that reads: other settings are
    refused. Else in a Spark of its own.
    """
    if from_archive and settings.archive is None:
        raise ConfigurationError(problem="--from-archive needs to know which", fix="Name it with --archive URI")
    report = _report(settings, settings.archive if from_archive else None)
    if parquet is not None:
        _write_parquet(report, parquet)
    if as_json:
        emit_json(report)
        return
    typer.echo(f"Total: {report['total']:,} ratings, {report['rejected']:,} rejected records")
    for title, name, columns in (
        ("Ratings by stars", "histogram", ("rating", "count")),
        ("Top movies by hour", "top_movies", ("period_start_ms", "rank", "movieId", "title", "count", "avg_rating")),
        ("Ratings by genre", "genres", ("genre", "count", "avg_rating")),
    ):
        table = Table(*columns, title=title)
        for row in report[name]:
            table.add_row(*(str(row[column]) for column in columns))
        _console.print(table)


def _report(settings: Settings, archive: str | None) -> dict[str, Any]:
    given = settings.model_fields_set
    asked = {name: getattr(settings, name) for name in ("bootstrap_servers", *_REPORTED) if name in given}
    catalogue = load_catalogue(settings).digest if given.intersection(_CATALOGUE) else None
    with spark_job(settings) as ask:
        report: dict[str, Any] = ask("run_batch", archive, asked, catalogue, timeout_s=_BATCH_S)
    return report


def _write_parquet(report: dict[str, Any], folder: Path) -> None:
    import pandas as pd

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("histogram", "top_movies", "genres"):
            pd.DataFrame(report[name]).to_parquet(folder / f"{name}.parquet", index=False)
    except OSError as error:
        raise EnvironmentProblem(problem=f"{folder} cannot be written ({error.strerror})", fix="Name another") from None


# -- doctor and reset


@with_settings(*BROKER, *GENERATOR, *PROCESSOR, *SERVING)
def doctor_command(settings: Settings, as_json: JSON = False) -> None:
    """Look at everything that must be right before a start; ends with 1 when something makes it impossible."""
    findings = doctor.examine(settings)
    if as_json:
        emit_json([{"check": f.check, "level": f.level, "detail": f.detail, "fix": f.fix} for f in findings])
    else:
        colours = {"ok": "green", "warning": "yellow", "problem": "red"}
        for finding in findings:
            level = typer.style(f"{finding.level:<8}", fg=colours[finding.level])
            typer.echo(f"{level} {finding.check}: {finding.detail}" + (f". {finding.fix}" if finding.fix else ""))
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


@with_settings(*NAMED_BROKER, *STATE, *(name for name in TOPICS if name.endswith("_topic")), "checkpoint", "archive")
def reset(
    settings: Settings,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
) -> None:
    """Clear checkpoint, topics and state of this pipeline, and nothing else."""
    alive = [*active_runs(settings.state_dir), *followers(settings.state_dir)]
    if alive:
        who = " and ".join(f"process {run.pid} ({', '.join(run.stages)})" for run in alive)
        raise EnvironmentProblem(
            problem=f"the state directory {settings.state_dir} is in use by {who}", fix="Stop it first"
        )
    with broker_kept_out(settings.state_dir):
        _clear(settings, yes)


def _clear(settings: Settings, yes: bool) -> None:
    names_of_state = ("broker", "checkpoint", "checkpoint-archive", "logs", "runs", FOLLOWERS)
    state = [settings.state_dir / name for name in names_of_state]
    there = [path for path in state if path.exists()]
    names = []
    if brokers := settings.brokers:
        check_broker(brokers)
        names = list(partitions_of(brokers, _own_topics(settings)))
        _require_silence(settings, brokers, names, SystemClock())
    if not there and not names:
        typer.echo("nothing to clear")
        return
    typer.echo("will be removed: " + ", ".join([*map(str, there), *(f"topic {name}" for name in names)]))
    stays = [f"checkpoint {at}" for at in (settings.checkpoint, settings.archive_checkpoint_uri) if settings.checkpoint]
    stays += [f"archive {settings.archive}"] if settings.archive else []
    if stays:
        typer.echo("stays, because it is not in the state directory: " + ", ".join(stays))
        typer.echo("remove that too, or name others in the next run: it goes with what is cleared")
    if not yes and not typer.confirm("Go on?"):
        raise typer.Exit(1)
    if brokers:
        delete_topics(settings, brokers)
    for path in there:
        # out of the way at once: whoever starts here meanwhile begins with a folder of its own
        gone = path.rename(path.with_name(f"{path.name}.cleared-{os.getpid()}"))
        shutil.rmtree(gone)
    typer.echo("cleared")


def _require_silence(settings: Settings, bootstrap: str, there: list[str], clock: Clock) -> None:
    """Refuse to take topics from under a pipeline that runs from anywhere: whatever sends or counts says so once a second.

    Raises:
        EnvironmentProblem: a generator or a Spark job was heard.
    """
    places = {"generator": settings.progress_topic, "job": settings.job_topic}
    said = {key: _newest(settings, bootstrap, topic, key) for key, topic in places.items() if topic in there}
    left = {key: record for key, record in said.items() if record.get("state", "stopped") != "stopped"}
    if left:
        typer.echo(f"listening for {_SILENT_S:g} s whether a pipeline still uses these topics")
    until_ms = clock.now_ms() + round(_SILENT_S * 1000)
    while left and clock.now_ms() < until_ms:
        clock.wait(threading.Event(), _LISTEN_EVERY_S)
        for key, before in left.items():
            now = _newest(settings, bootstrap, places[key], key)
            if now.get("updated_ms") != before.get("updated_ms"):
                who = (
                    f"generator of run {now.get('run')}"
                    if key == "generator"
                    else f"Spark job {now.get('application')}"
                )
                raise EnvironmentProblem(
                    problem=f"the {who} uses these topics: it has just reported",
                    fix="Stop it first (ray-pipeline status shows it), or name other topics",
                )


def _own_topics(settings: Settings) -> list[str]:
    from ray_pipeline.kafka.topics import topic_specs

    return [spec.name for spec in topic_specs(settings)]


# -- inside


def _running_broker(settings: Settings) -> str:
    if brokers := settings.brokers:
        check_broker(brokers)
        return brokers
    run = active_run(settings.state_dir)
    if run is None:
        raise ConfigurationError(
            problem=f"no pipeline runs in the state directory {settings.state_dir}",
            fix="Name its --state-dir or --bootstrap-servers",
        )
    return brokers_of(run, settings)


def _newest(settings: Settings, bootstrap: str, topic: str, key: str) -> dict[str, Any]:
    value = newest_of_key(bootstrap, topic, key, 15.0, committed=False)  # status records: in no transaction
    found: dict[str, Any] = json.loads(value) if value else {}
    return found
