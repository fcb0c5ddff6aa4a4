"""Fragments of the page: plain data in, HTML and data frames out. Everything that came from Kafka is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import pandas as pd

from ray_pipeline.codec import parse_json
from ray_pipeline.metrics.health import Health
from ray_pipeline.metrics.verdicts import difference_text
from ray_pipeline.windows.spec import iso_ms

__all__ = [
    "actors",
    "explanation",
    "genres",
    "header",
    "histogram",
    "history",
    "links",
    "movies",
    "pieces",
    "plan_curve",
    "ratings_tail",
    "scoreboard",
    "tiles",
    "windows",
]

_PIECES = {
    "burst": " + burst(500 for 5s every 30s)",
    "spike": " + spike(peak=800, rise=20s, hold=20s, fall=40s)",
    "wave": " + sine(mean=100, amplitude=100, period=2m)",
    "then ramp": " for 1m then ramp(100..400, 3m) then 400",
}
_LINKS = {
    "HTTP API": "/docs",
    "Prometheus": "/metrics",
    "history as CSV": "/metrics/history?format=csv",
    "scores": "/predictions/scores",
}
_CHARTED = ("1678", "2262")
"""The years from the first to before the second are those that pandas has nanoseconds for."""
_NOTHING = '<p class="rp-none">no data yet</p>'


def header(
    health: Health, kafka_connected: bool, last_update: str | None, run: str | None, state: str | None = None
) -> str:
    """Name and state of the run, health with its reason, since when the data are stale."""
    reason = "; ".join(health.reasons) or "all stages answer, and every closed window holds what it must"
    stale = ""
    if health.stale_since_ms is not None:
        stale = f'<span class="rp-stale">stale since {iso_ms(health.stale_since_ms)[:19].replace("T", " ")} UTC</span>'
    kafka = "Kafka connected" if kafka_connected else "Kafka away"
    updated = f"updated {escape(_clock(last_update))} UTC" if last_update else "no window yet"
    return (
        f'<div class="rp-head rp-is-{escape(state or "starting")}"><div><h1>ray-pipeline</h1>'
        f'<p class="rp-sub">run {escape(run or "–")} · {escape(state or "not started")} · {kafka} · {updated}</p></div>'
        f'<div class="rp-health rp-{escape(health.status)}" role="status"><b>{escape(health.status)}</b>'
        f"<span>{escape(reason)}</span>{stale}</div></div>"
    )


def tiles(summary: dict[str, Any], window_type: str) -> str:
    """The numbers."""
    generator, job, latency = summary["generator"], summary["job"], summary["latency_ms"] or {}
    window = summary["windows"].get(window_type) or {}
    checked = summary["verification"]
    target = generator.get("plan_rate")
    pace = _pace(generator)
    base = int(generator.get("base") or 0)
    delivered_note = f"{generator['delivered_total']:,} in all" + (f", {base:,} before this run" if base else "")
    rows: list[tuple[str, str, str]] = [
        ("Target", _number(target, "/s"), pace),
        ("Delivered", _number(generator.get("delivered_rate"), "/s"), delivered_note),
        ("Ratings a minute", f"{generator.get('delivered_last_minute', 0):,}", "delivered in the last 60 s"),
        ("Mean rating", _fixed(window.get("avg_rating"), 3, " ★"), _percentiles(window)),
        ("Latency p50", _number(latency.get("p50"), " ms"), f"p95 {_number(latency.get('p95'), ' ms')}"),
        ("Lag", _number(job.get("lag")), "ratings not read yet by Spark"),
        ("Batch", _number(job.get("batch_duration_ms"), " ms"), _batch(job)),
        ("Watermark delay", _number(_seconds(job.get("watermark_delay_ms")), " s"), "behind the newest rating"),
        ("Dropped as late", _number(job.get("late_dropped")), f"{_number(job.get('rejected'))} rejected"),
        ("Counted", _number(job.get("counted")), "in tumbling windows"),
        ("Windows verified", _number(checked["verified"] + checked["late_by_design"]), _verdicts(checked)),
        ("Windows wrong", _number(checked["wrong"]), _first_wrong(checked)),
    ]
    cells = "".join(
        f'<div class="rp-tile"><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for label, value, note in rows
    )
    alarm = " rp-alarm" if checked["wrong"] else ""
    return f'<div class="rp-tiles{alarm}">{cells}</div>'


def _pace(generator: dict[str, Any]) -> str:
    state, reached_ms = generator.get("state"), generator.get("event_reached_ms")
    if state is None:
        return "no data yet"
    if state == "backfilling" and reached_ms is not None:
        return f"backfilling: {iso_ms(reached_ms)[:16].replace('T', ' ')} reached"
    if state != "running":
        return str(state)
    return f"behind by {float(generator.get('behind_s') or 0):.1f} s"


def history(windows: Sequence[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Count and mean by window, for two charts; without the window that is still filling, once there are others.

    What somebody says of another age is not drawn.
    """
    windows = [w for w in windows if _CHARTED[0] <= w["window_start"] < _CHARTED[1]]
    if len(windows) > 1 and not windows[-1]["final"]:
        windows = windows[:-1]
    # a type that does not depend on the data: the chart takes its axis from it before the first window
    times = pd.to_datetime([w["window_start"] for w in windows], utc=True).tz_localize(None).astype("datetime64[ns]")
    count = pd.DataFrame({"window": times, "ratings": [float(w["count"]) for w in windows]})
    mean = pd.DataFrame({"window": times, "mean rating": [w["avg_rating"] for w in windows]})
    return count, mean


def plan_curve(curves: dict[str, Any], now_ms: int) -> pd.DataFrame:
    """The plan's rate and the one delivered over event time, for a chart."""
    names = {"planned": "plan", "delivered": "delivered", "typed": "as typed"}
    # a chart draws only those lines that it was begun with, so a line without points has one that is not drawn
    rows = [(at_ms, rate, name) for key, name in names.items() for at_ms, rate in curves[key] or [(now_ms, math.nan)]]
    return pd.DataFrame(
        {
            "time": pd.to_datetime([row[0] for row in rows], unit="ms").astype("datetime64[ns]"),
            "ratings a second": pd.Series([row[1] for row in rows], dtype="float64"),
            "rate": pd.Series([row[2] for row in rows], dtype="object"),
        }
    )


def pieces() -> str:
    """What can be dragged into a plan, or clicked on."""
    found = "".join(
        f'<button type="button" draggable="true" data-rp-piece="{escape(text)}" title="{escape(text)}">{escape(name)}</button>'
        for name, text in _PIECES.items()
    )
    return f'<p class="rp-pieces">drag into the plan, or click: {found}</p>'


def links(api_url: str, everywhere: bool) -> str:
    """Links to the API.

    Args:
        api_url: where it is, seen from this machine.
        everywhere: whether it listens at every address: the page's script then puts the one in that the page was asked for.
    """
    mark = " data-rp-everywhere" if everywhere else ""
    found = (f'<a href="{api_url}{path}" target="_blank"{mark}>{name}</a>' for name, path in _LINKS.items())
    return f'<p class="rp-foot">{" · ".join(found)}</p>'


def histogram(window: dict[str, Any] | None) -> pd.DataFrame:
    """Ratings by half star."""
    counts = window["histogram"] if window else [0] * 10
    return pd.DataFrame({"stars": [f"{half / 2:.1f}" for half in range(1, 11)], "ratings": counts})


def genres(record: dict[str, Any] | None, names: Sequence[str]) -> pd.DataFrame:
    """Ratings by genre; always the same genres in the same order, so that the chart stands still."""
    count = {row["genre"]: row["count"] for row in record["genres"]} if record else {}
    return pd.DataFrame({"genre": list(names), "ratings": [count.get(name, 0) for name in names]})


def movies(record: dict[str, Any] | None, titles: Iterable[str | None]) -> str:
    """The most rated movies."""
    if not record or not record["movies"]:
        return _section("Top movies", _NOTHING)
    most = max(movie["count"] for movie in record["movies"]) or 1
    rows = "".join(
        f"<tr><td>{rank}</td><td>{escape(title or 'not in the catalogue')}<small> {movie['movieId']}</small></td>"
        f'<td class="rp-bar"><i style="width:{100 * movie["count"] / most:.0f}%"></i><em>{movie["count"]:,}</em></td>'
        f"<td>{movie['avg_rating']:.2f}</td></tr>"
        for rank, (movie, title) in enumerate(zip(record["movies"], titles, strict=False), 1)
    )
    return _section("Top movies", _table(("", "movie", "ratings", "mean"), rows))


def actors(generator: dict[str, Any], job: dict[str, Any]) -> str:
    """Generator actors and partitions: sent by the shard, read by Spark."""
    title = "Partitions and actors"
    if not generator.get("partitions"):
        return _section(title, _NOTHING)
    owner = {str(p): actor for actor in generator.get("actors", ()) for p in actor["partitions"]}
    read = job.get("partitions", {})
    rows = []
    for partition, sent in generator["partitions"].items():
        actor = owner.get(partition)
        who = "–" if actor is None else f"actor {actor['actor']}" + ("" if actor["alive"] else " (down)")
        restarts = "–" if actor is None else str(actor["restarts"])
        rows.append(
            f"<tr><td>{escape(partition)}</td><td>{escape(who)}</td><td>{sent:,}</td>"
            f"<td>{int(read.get(partition, {}).get('records', 0)):,}</td><td>{restarts}</td></tr>"
        )
    return _section(title, _table(("partition", "owner", "sent", "read", "restarts"), "".join(rows)))


def windows(rows: Sequence[dict[str, Any]]) -> str:
    """What the newest windows must hold and what they hold, newest first."""
    title = "Windows: expected against actual"
    if not rows:
        return _section(title, _NOTHING)
    cells = []
    for row in reversed(rows):
        expected = row["expected"]
        word = row["verdict"].split()[0].lower()
        note = f"<small> {escape(row['reason'])}</small>" if row["reason"] else ""
        cells.append(
            f"<tr><td>{escape(_clock(row['window_start']))}</td>"
            f"<td>{_number(expected['count'] if expected else None)}</td><td>{row['count']:,}</td>"
            f"<td>{difference_text(row['difference'])}</td>"
            f'<td><b class="rp-verdict rp-{escape(word)}">{escape(row["verdict"])}</b>{note}</td></tr>'
        )
    return _section(title, _table(("from, UTC", "expected", "actual", "difference", "verdict"), "".join(cells)))


def ratings_tail(values: Iterable[tuple[int, int, bytes | None]], titles: dict[int, str]) -> str:
    """The newest ratings: partition, offset and value, newest first; a click on one asks where it comes from."""
    rows = []
    for partition, offset, value in values:
        try:
            fields = parse_json(value)
            movie = str(titles.get(fields["movieId"], fields["movieId"]))
            stars = float(fields["rating"])
            when = _clock(iso_ms(int(fields["timestamp"])))
            cells = (
                f"<td>{escape(when)}</td><td>{escape(str(fields['userId']))}</td><td>{escape(movie)}</td>"
                f'<td class="rp-stars">{stars:.1f} ★</td>'
            )
        except (ValueError, KeyError, TypeError, OverflowError):
            text = (value or b"").decode(errors="replace")[:80]
            cells = f'<td colspan="4" class="rp-bad">no valid rating: {escape(text)}</td>'
        rows.append(f'<tr data-rp-place="{partition}/{offset}">{cells}<td>{partition}</td></tr>')
    head = ("event time, UTC", "user", "movie", "rating", "p.")
    return _section("Newest ratings", _table(head, "".join(rows)) if rows else _NOTHING)


def explanation(found: dict[str, Any] | None) -> str:
    """Where a rating comes from; None before any was asked for."""
    if found is None:
        return _section("Where it comes from", '<p class="rp-none">click on one of the newest ratings</p>')
    kafka = found["kafka"]
    if found["index"] is None:
        text = (
            f"partition {found['partition']}, offset {kafka['offset']}: no rating of this run, somebody else wrote it"
        )
        return _section("Where it comes from", f'<p class="rp-bad">{escape(text)}</p>')
    score, rounding, movie = found["score"], found["rounding"], found["movie"]
    signed = {name: f"{value:+.3f}" for name, value in score.items()}
    genres = ", ".join(movie["genres"])
    drift = f" {signed['drift']} drift" if score["drift"] else ""
    rows = [
        ("rating", f"{found['index']:,} of partition {found['partition']}, due at {found['time']['event_time']}"),
        ("user", f"{found['user']['userId']}, bias {signed['user_bias']}"),
        ("movie", f"{movie['title']} ({genres}), bias {signed['movie_bias']}"),
        ("factors", f"their product is {signed['dot_product']}"),
        ("noise", signed["noise"]),
        (
            "score",
            f"{score['mean']:g} {signed['user_bias']} {signed['movie_bias']} {signed['dot_product']}{drift} {signed['noise']} "
            f"= {score['raw']:.3f}",
        ),
        (
            "whole star" if rounding["step"] == 1 else "half star",
            f"{rounding['rating']:.1f} ★"
            + (f", clipped from {rounding['half_star']:.1f}" if rounding["clipped"] else ""),
        ),
        *([("attack", found["attack"]["text"])] if found["attack"] else []),
        ("windows", ", ".join(f"{w['window_type']} {_clock(w['window_start'])}" for w in found["windows"])),
        ("in Kafka", _in_kafka(kafka)),
    ]
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows)
    table = f'<table class="rp-table"><tbody>{body}</tbody></table>'
    return _section("Where it comes from", table + _vectors(found["factors"]))


def _vectors(factors: dict[str, list[float]]) -> str:
    """Both factor vectors, folded."""
    said = "".join(f"<p>{escape(of)}: {' '.join(f'{x:+.3f}' for x in vector)}</p>" for of, vector in factors.items())
    return f"<details><summary>both factor vectors</summary>{said}</details>"


def _in_kafka(kafka: dict[str, Any] | None) -> str:
    if kafka is None:
        return "not there"
    return f"at offset {kafka['offset']:,}, " + (
        "byte for byte the same" if kafka["agrees"] else f"altered: {kafka['differs']}"
    )


def scoreboard(models: Sequence[dict[str, Any]], failed: str = "") -> str:
    """Each model's errors, and beside them the best possible and the baselines on the same ratings.

    Args:
        models: their scores.
        failed: why there are no newer ones; empty while they are kept up.
    """
    title = "Scoreboard"
    said = f'<p class="rp-bad">no scores any more: {escape(failed)}</p>' if failed else ""
    if not models:
        none = '<p class="rp-none">no predictions yet: learners write to topic predictions</p>'
        return _section(title, said or none)
    rows = []
    for score in models:
        scored = f"{score['matched']:,}" + (f" + {score['unmatched']:,} unmatched" if score["unmatched"] else "")
        repeated = f"<small> {score['repeated']:,} repeated</small>" if score["repeated"] else ""
        rows.append(
            f"<tr><td><b>{escape(str(score['model']))}</b></td><td>{scored}{repeated}</td>"
            f"<td>{100 * score['coverage']:.1f} %</td>{_errors(score)}</tr>"
        )
        about = "biases only, roughly" if score["bias_only"].get("inexact_by") else "biases only"
        for name, label in (("floor", "best possible"), ("bias_only", about), ("global_mean", "global mean")):
            rows.append(f'<tr class="rp-beside"><td>{label}</td><td></td><td></td>{_errors(score[name])}</tr>')
    head = ("model", "scored", "coverage", "RMSE observed", "MAE observed", "RMSE truth", "MAE truth")
    return _section(title, said + _table(head, "".join(rows)))


def _errors(score: dict[str, Any]) -> str:
    return "".join(
        f"<td>{_fixed(score[against][kind], 4, '')}</td>"
        for against in ("observed", "truth")
        for kind in ("rmse", "mae")
    )


def _table(head: tuple[str, ...], rows: str) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<table class="rp-table"><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>'


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _clock(iso: str) -> str:
    """The time of day of an ISO-8601 time."""
    return iso[11:19]


def _verdicts(checked: dict[str, Any]) -> str:
    late = f", {checked['late_by_design']:,} with late ratings" if checked["late_by_design"] else ""
    return f"{checked['pending']:,} pending{late}"


def _first_wrong(checked: dict[str, Any]) -> str:
    if not checked["wrong_windows"]:
        return "expected against actual"
    first = checked["wrong_windows"][0]
    return f"first: {_clock(first['window_start'])} {first['window_type']}"


def _batch(job: dict[str, Any]) -> str:
    return f"number {job['batch']:,}" if job.get("batch", -1) >= 0 else "none yet"


def _percentiles(window: dict[str, Any]) -> str:
    if window.get("p50") is None:
        return "no data yet"
    return f"median {window['p50']:.1f}, p95 {window['p95']:.1f}"


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def _fixed(value: float | None, digits: int, unit: str) -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    small = abs(value) < 100 and value != int(value)
    return (f"{value:,.1f}" if small else f"{value:,.0f}") + unit
