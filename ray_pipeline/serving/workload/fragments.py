"""HTML of the part of the page where a stream is put together: what it would be like, and what starts it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np

from ray_pipeline.config import EVENT_FIELDS
from ray_pipeline.conformance.preview import PREVIEW_RECORDS, RATE_STEP_S, Preview
from ray_pipeline.knobs import Knob, knob_of
from ray_pipeline.serving.workload.composing import Composed

__all__ = ["compared", "difference", "help_text", "label", "problem", "starts"]

Format = Callable[[float], str]

_WIDTH, _HEIGHT = 360, 130
_TOP = 18  # of a line, below the text
_FILE = "stream.toml"


def label(knob: Knob) -> str:
    """A control's label: the setting's name in words, with its unit."""
    unit = knob.unit
    name = knob.name.removesuffix(f"_{unit}") if unit else knob.name
    return name.replace("_", " ") + (f", {unit}" if unit else "")


def help_text(knob: Knob, reason: str = "") -> str:
    """What stands with a control: what the setting means, its range, and why it cannot be changed."""
    told = knob.help + ("; one a line" if knob.kind == "texts" else "")
    if knob.kind in ("whole", "number") and knob.range:
        told += f" ({knob.range})"
    return f"{told} – {reason}" if reason else told


def problem(text: str) -> str:
    """What is wrong with the values."""
    return f'<p class="rp-problem" role="alert">{escape(text)}</p>'


def starts(composed: Composed) -> str:
    """How this stream is started."""
    data = escape(f"data:application/toml;charset=utf-8,{quote(composed.file)}")
    download = f'<a download="{_FILE}" href="{data}">Download</a>'
    return (
        f"{_code('Start it beside the one that runs', 'command', composed.command)}"
        f"{_code(f'Or by a file: ray-pipeline run --config {_FILE}', 'file', composed.file, download)}"
    )


def compared(present: Preview, changed: Preview) -> str:
    """Both streams beside each other: three charts, and the numbers; those that differ stand out."""
    rows = "".join(_row(name, of, shown, present, changed) for name, of, shown in _LINES if of(present) or of(changed))
    alike = abs(present.records - changed.records) < PREVIEW_RECORDS // 20
    each = (
        f"some {PREVIEW_RECORDS:,} records of each" if alike else f"{present.records:,} and {changed.records:,} records"
    )
    return (
        f'<p class="rp-key"><i class="rp-present"></i>in force <i class="rp-changed"></i>changed</p>'
        f'<div class="rp-charts">{_stars(present, changed)}'
        f"{_lines('Mean rating in the course of it', present.course, changed.course, '★', f'first {changed.span:,} ratings')}"
        f"{_lines('Rate by its plan', present.planned, changed.planned, '/s', _minutes(present))}</div>"
        f'<table class="rp-table rp-compared"><thead><tr><th></th><th>in force</th><th>changed</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
        f'<p class="rp-sub">{each}, of the first {changed.span:,}, made again here; nothing is sent.</p>'
    )


def difference(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """What differs from the stream in force: settings, each with both values."""
    if not changed:
        return '<p class="rp-sub">These are the values of the stream in force.</p>'
    items = "".join(
        f"<li>{_name(name)} <s>{escape(_brief(before))}</s> → {escape(_brief(after))}</li>"
        for name, (before, after) in changed.items()
    )
    again = any(name in EVENT_FIELDS for name in changed)
    note = "needs a new stream" if again else "can be had on the running stream too: change rate or plan above"
    return f'<ul class="rp-changes">{items}</ul><p class="rp-sub">This {note}.</p>'


def _name(name: str) -> str:
    told = escape(label(knob_of(name)))
    return f"<b>{told}</b>" if name in EVENT_FIELDS else told


def _brief(value: Any) -> str:
    text = f"{value:,.12g}" if isinstance(value, (int, float)) else str(value).replace("\n", "; ")
    return (text[:57] + "…" if len(text) > 58 else text) or "–"


def _code(title: str, kind: str, text: str, more: str = "") -> str:
    return (
        f'<div class="rp-code" id="rp-{kind}"><p><b>{title}</b><span><button type="button" data-rp-copy>Copy</button>{more}</span></p>'
        f"<pre>{escape(text.strip())}</pre></div>"
    )


def _row(name: str, of: Callable[[Preview], float], shown: Format, present: Preview, changed: Preview) -> str:
    before, after = (shown(of(p)) for p in (present, changed))
    mark = ' class="rp-differs"' if before != after else ""
    return f"<tr{mark}><td>{name}</td><td>{before}</td><td>{after}</td></tr>"


def _fixed(digits: int, unit: str = "") -> Format:
    return lambda value: "–" if math.isnan(value) else f"{value:,.{digits}f}{unit}"


def _share(value: float) -> str:
    return _fixed(1, " %")(100 * value)


_LINES: tuple[tuple[str, Callable[[Preview], float], Format], ...] = (
    ("ratings a second, first ten minutes", lambda p: p.rate, lambda v: f"{v:,.4g}"),
    ("burstiness: 0 evenly, 1 at random", lambda p: p.burstiness, _fixed(2)),
    ("mean rating", lambda p: p.mean, _fixed(3, " ★")),
    ("standard deviation", lambda p: p.spread, _fixed(3, " ★")),
    ("what can be learned of the ratings", lambda p: p.explained, _share),
    ("the ten most rated movies have", lambda p: p.top_movies, _share),
    ("the ten most active users give", lambda p: p.top_users, _share),
    ("movies rated", lambda p: p.movies, _fixed(0)),
    ("users who rate", lambda p: p.users, _fixed(0)),
    ("ratings of a user in a row", lambda p: p.session, _fixed(1)),
    ("at another time than due", lambda p: p.off_time, _share),
    ("by, on average", lambda p: p.off_by_s, _fixed(1, " s")),
    ("repeated", lambda p: p.repeated, _share),
    ("no valid rating", lambda p: p.unreadable, _share),
    ("with a field that nobody knows", lambda p: p.unknown_field, _share),
    ("lost", lambda p: p.lost, _share),
    ("held back by a silence", lambda p: p.held, _share),
)


def _stars(present: Preview, changed: Preview) -> str:
    most = max(float(present.stars.max()), float(changed.stars.max()), 1e-9)
    step, bar, foot = _WIDTH / 10, _WIDTH / 10 * 0.38, _HEIGHT - 16
    parts = []
    for half in range(10):
        left = half * step + step * 0.1
        for shares, kind, at in ((present.stars, "present", left), (changed.stars, "changed", left + bar)):
            high = (foot - 6) * float(shares[half]) / most
            title = f"<title>{(half + 1) / 2:g} ★: {100 * shares[half]:.1f} % {'in force' if kind == 'present' else kind}</title>"
            parts.append(
                f'<rect class="rp-{kind}" x="{at:.1f}" y="{foot - high:.1f}" width="{bar:.1f}" height="{high:.1f}">{title}</rect>'
            )
        parts.append(f'<text x="{left + bar:.1f}" y="{_HEIGHT - 3}" text-anchor="middle">{(half + 1) / 2:g}</text>')
    return _chart("Ratings by stars", "".join(parts))


def _lines(title: str, present: Any, changed: Any, unit: str, along: str) -> str:
    """Two lines over the same positions; the axis spans what both reach."""
    both = np.concatenate([present, changed])
    known = both[np.isfinite(both)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    low, high = (low - 0.1, high + 0.1) if unit == "★" else (0.0, high)
    low, high = (low, high) if high > low else (low, low + 1.0)
    foot = _HEIGHT - 18
    drawn = "".join(
        f'<polyline class="rp-{kind}" points="{_points(values, low, high, foot)}"/>'
        for kind, values in (("present", present), ("changed", changed))
    )
    texts = (
        f'<text x="0" y="12">{high:,.4g} {unit}</text><text x="0" y="{foot - 2}">{low:,.4g}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 3}" text-anchor="end">{along} →</text>'
    )
    return _chart(title, f'<line x1="0" y1="{foot}" x2="{_WIDTH}" y2="{foot}"/>{drawn}{texts}')


def _points(values: Any, low: float, high: float, foot: float) -> str:
    places = [
        (_WIDTH * n / max(1, len(values) - 1), _TOP + (foot - _TOP) * (1 - (value - low) / (high - low)))
        for n, value in enumerate(values)
        if math.isfinite(value)
    ]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _minutes(present: Preview) -> str:
    return f"first {len(present.planned) * RATE_STEP_S / 60:g} minutes"


def _chart(title: str, drawn: str) -> str:
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{drawn}</svg></figure>'
    )
