"""Commands that compare what is in Kafka with what must be there."""

from __future__ import annotations

import json
import textwrap
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_pipeline.command.options import BROKER, JSON, TOPICS, emit_json, with_settings
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.state import broker_for_reading

if TYPE_CHECKING:
    from ray_pipeline.verification.audit import AuditReport

__all__ = ["audit", "explain", "grade"]

_WIDTH = 100
_LATEST_S = 86_400 * 3_660
_EXIT_CODES = {"agreed": 0, "disagreed": 1, "unchecked": 2}

TIME = "event time, ISO-8601 (UTC where no zone is given)"


@with_settings(*BROKER, *TOPICS, "catalog", "model", "schema_registry_url")
def audit(
    settings: Settings,
    from_: Annotated[str | None, typer.Option("--from", metavar="TIME", help=f"look from here on: {TIME}")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="TIME", help=f"look up to here: {TIME}")] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="readers side by side  [default: as many as pay]", show_default=False),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Compare ratings and windows in Kafka with what the run must have left there, record by record.

    Needs the brokers alone: the run published its configuration. Ends with 0 when they agree, 1 when they do not, 2 when it
    could not be checked.
    """
    from ray_pipeline.verification.audit import audit as compare

    from_ms, to_ms = _time("--from", from_), _time("--to", to)
    if from_ms is not None and to_ms is not None and to_ms <= from_ms:
        raise ConfigurationError(problem="--to must be after --from", fix="Give a later time")
    with broker_for_reading(settings) as bootstrap:
        report = compare(settings, bootstrap, from_ms, to_ms, processes)
    if as_json:
        emit_json(report.as_dict())
    else:
        _print_report(report)
    raise typer.Exit(_EXIT_CODES[report.verdict])


@with_settings(*BROKER, *TOPICS, "catalog", "model", "schema_registry_url")
def explain(
    settings: Settings,
    partition: Annotated[int, typer.Option(min=0, help="partition of the ratings topic")],
    index: Annotated[int | None, typer.Option(min=0, help="index of the rating in its partition")] = None,
    offset: Annotated[int | None, typer.Option(min=0, help="offset of the record, in place of its index")] = None,
    as_json: JSON = False,
) -> None:
    """Show where a rating comes from: user, movie, factors, noise, rounding, time, windows, and what is in Kafka."""
    from ray_pipeline.verification.explain import Explainer

    if (index is None) == (offset is None):
        raise ConfigurationError(problem="give --index or --offset, one of them", fix="Such as --index 0")
    with broker_for_reading(settings) as bootstrap:
        explainer = Explainer(settings, bootstrap)
        found = (
            explainer.by_offset(partition, offset) if offset is not None else explainer.by_index(partition, index or 0)
        )
    if as_json:
        emit_json(found)
    else:
        _print_explanation(found)


@with_settings(*BROKER, *TOPICS, "catalog")
def grade(
    settings: Settings,
    topic: Annotated[str, typer.Option("--topic", help="topic that the other system wrote")],
    role: Annotated[
        str, typer.Option("--as", metavar="deduplicated|rejected|late|attacked", help="what it is to hold")
    ],
    kind: Annotated[str, typer.Option(help="grade on one kind of case alone, such as malformed or out_of_order")] = "",
    lateness: Annotated[
        float, typer.Option(min=0, max=_LATEST_S, help="as late count those at least so late, seconds")
    ] = 0.0,
    as_json: JSON = False,
) -> None:
    """Give another system marks: precision and recall of what it kept, rejected or called late.

    Needs the brokers alone: what is broken on purpose is in topic ratings.truth.
    """
    from ray_pipeline.verification.grading import grade as give_marks

    with broker_for_reading(settings) as bootstrap:
        marks = give_marks(settings, bootstrap, topic, role, kind, round(lateness * 1000))
    if as_json:
        emit_json(marks)
    else:
        _print_marks(marks)


# -- inside


def _time(flag: str, text: str | None) -> int | None:
    """ISO-8601 → epoch milliseconds."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigurationError(
            problem=f"{flag} {text!r} is no ISO-8601 time", fix="Such as 2026-01-31T12:00:00Z"
        ) from None
    return round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)


def _print_report(report: AuditReport) -> None:
    if report.verdict == "unchecked":
        typer.echo(f"unchecked: {report.reason}")
        return
    typer.echo(f"Ratings of run {report.run}: {_in_words(report.records)}")
    for partition, row in sorted(report.partitions.items(), key=lambda item: int(item[0])):
        typer.echo(f"  partition {partition}: {_in_words(row)}")
    if report.by_design:
        typer.echo(
            "On purpose: " + ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in report.by_design.items())
        )
    windows = report.windows
    typer.echo(
        f"Windows: {windows['checked']:,} checked, {windows['wrong']:,} wrong, {windows['pending']:,} pending, "
        f"{windows['late_dropped']:,} ratings dropped as late"
        + (f", {windows['other_definition']:,} of an unknown definition" if windows["other_definition"] else "")
        + (f" ({windows['reason']})" if windows["reason"] else "")
    )
    for finding in report.findings:
        typer.echo(str(finding))
    if report.reason:
        typer.echo(f"not compared: {report.reason}")
    typer.echo(f"{report.verdict} ({report.records_per_s:,.0f} records/s, {report.duration_s:.1f} s in all)")


def _print_marks(marks: dict[str, Any]) -> None:
    role = f"{marks['role']} ({marks['kind']})" if marks["kind"] else marks["role"]
    typer.echo(
        f"{marks['topic']} as {role}: precision {marks['precision']:.4f}, recall {marks['recall']:.4f}, F1 {marks['f1']:.4f}"
    )
    typer.echo(
        f"{marks['expected']:,} expected, {marks['found']:,} found: {marks['true_positives']:,} right, "
        f"{marks['false_positives']:,} too many, {marks['false_negatives']:,} missing; {marks['ignored']:,} count neither way"
    )
    for name, what in (("false_positives", "too many"), ("false_negatives", "missing")):
        for example in marks["examples"][name]:
            typer.echo(f"{what}: {example if isinstance(example, str) else json.dumps(example)}")


def _in_words(row: dict[str, int]) -> str:
    apart = ("expected", "found", "outside")
    wrong = [f"{n:,} {kind.replace('_', ' ')}" for kind, n in row.items() if kind not in apart and n]
    posted = f"{row['outside']:,} foreign ones posted from outside, " if row["outside"] else ""
    return f"{row['expected']:,} expected, {row['found']:,} found, {posted}" + (
        ", ".join(wrong) or "all as they must be"
    )


def _print_explanation(found: dict[str, Any]) -> None:
    kafka = found["kafka"]
    if found["index"] is None:
        posted = " it was posted from outside, and is accounted for:" if found["outside"] else ""
        typer.echo(
            f"foreign: the record at offset {kafka['offset']} is no rating of this run:{posted} {kafka['value']}"
        )
        return
    score, rounding, movie = found["score"], found["rounding"], found["movie"]
    typer.echo(f"rating {found['index']:,} of partition {found['partition']}: {found['value'] or 'no value'}")
    typer.echo(f"movie: {movie['title']} ({', '.join(movie['genres']) or 'no genres'})")
    terms = ["mean", "user_bias", "movie_bias", "dot_product", *(["drift"] if score["drift"] else []), "noise"]
    typer.echo(
        "score: "
        + " ".join(f"{score[name]:+.4f} ({name.replace('_', ' ')})" for name in terms)
        + f" = {score['raw']:.4f}"
    )
    for of, factors in found["factors"].items():
        numbers = " ".join(f"{factor:+.3f}" for factor in factors)
        lines = textwrap.wrap(f"{of} factors: {numbers}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        typer.echo("\n".join(lines))
    clipped = f", clipped to {rounding['rating']}" if rounding["clipped"] else ""
    attack = found["attack"]
    if attack:
        typer.echo(
            f"attack: {attack['text']}" + (", camouflage" if attack["camouflage"] else f": {rounding['rating']}")
        )
    if not attack or attack["camouflage"]:
        kind = "whole" if rounding["step"] == 1 else "half"
        typer.echo(f"nearest {kind} star: {rounding['half_star']}{clipped}")
    typer.echo(f"due at {found['time']['event_time']}, at {found['time']['rate']:g} ratings/s over all partitions")
    if found["fault"] is not None:
        fault = found["fault"]
        parts = [f"{fault['lateness_ms'] / 1000:g} s late"] if fault["lateness_ms"] else []
        parts += [f"it repeats rating {fault['repeats']:,}"] if fault["repeats"] is not None else []
        parts += ["the job must reject it"] if fault["rejected"] else []
        typer.echo("; ".join([f"on purpose: {fault['kind'].replace('_', ' ')}", *parts]))
    for window in found["windows"]:
        typer.echo(f"in {window['window_type']} from {window['window_start']}")
    if kafka is not None:
        there = "the same" if kafka["agrees"] else f"{kafka['value']} ({kafka['differs']})"
        typer.echo(f"in Kafka at offset {kafka['offset']}: {there}")
    else:
        typer.echo("not in Kafka" + ("" if found["sent"] else ": the shard has not sent it yet"))
