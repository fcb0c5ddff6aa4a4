"""Pictures of a sample beside what is declared, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.judge import ConformanceReport, Row
from ray_pipeline.conformance.spoilt import delays_ms
from ray_pipeline.conformance.timing import windows
from ray_pipeline.conformance.values import expected_histogram, observed_histogram

__all__ = ["Chart", "draw_charts"]

Floats = npt.NDArray[np.float64]

# colours that stand for those of the page's style sheet
_INK, _OBSERVED, _DECLARED, _GRID = "#010203", "#040506", "#070809", "#0a0b0c"
_OF_THE_PAGE = {
    _INK: "var(--ink)",
    _OBSERVED: "var(--observed)",
    _DECLARED: "var(--declared)",
    _GRID: "var(--grid)",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_BINS = 24
_STRETCHES_MOST = 200
_CURVE = 400
_SHARES = ("user bias", "movie bias", "factors", "noise")


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture.

    Attributes:
        title: what is shown.
        svg: the picture, to be put into a page.
    """

    title: str
    svg: str


def draw_charts(evidence: Evidence, report: ConformanceReport) -> list[Chart]:
    """All pictures that the sample has something to show for."""
    rows = {row.name: row for row in report.checks}
    charts: list[tuple[str, Callable[[Axes], None] | None]] = [
        ("Ratings", _histogram(evidence)),
        ("Shares of variance", _shares([rows[name] for name in _SHARES])),
        ("Popularity of movies", _law(evidence.movie, evidence.declared.movie_law, "movie, by declared popularity")),
        ("Activity of users", _law(_users(evidence), evidence.declared.user_law, "user, by declared activity")),
        ("Rate over event time", _rate(evidence)),
        ("Genres", _genres(evidence)),
        ("Lateness", _lateness(evidence)),
    ]
    return [Chart(title, _svg(draw, title)) for title, draw in charts if draw is not None]


def _svg(draw: Callable[[Axes], None], title: str) -> str:
    style: Any = {**_STYLE, "svg.hashsalt": title}
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.4, 3.3), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    for colour, of_the_page in _OF_THE_PAGE.items():
        svg = svg.replace(colour, of_the_page)
    return svg[svg.index("<svg") :]


def _histogram(evidence: Evidence) -> Callable[[Axes], None] | None:
    if not len(evidence.scored):
        return None
    expected, observed = expected_histogram(evidence)[0], observed_histogram(evidence)

    def draw(axes: Axes) -> None:
        stars = np.arange(1, 11) / 2
        axes.bar(stars, 100 * observed / observed.sum(), 0.38, color=_OBSERVED, label="observed")
        axes.plot(stars, 100 * expected / expected.sum(), "D", color=_DECLARED, markersize=5, label="declared")
        axes.set(xlabel="rating, stars", ylabel="% of ratings", xticks=stars)
        axes.grid(axis="x", visible=False)
        axes.legend()

    return draw


def _shares(rows: list[Row]) -> Callable[[Axes], None] | None:
    told = [row for row in rows if row.estimate is not None and row.declared is not None]
    if not told:
        return None

    def draw(axes: Axes) -> None:
        at = np.arange(len(told))
        estimate = np.array([row.estimate for row in told], np.float64)
        low = np.array([row.low if row.low is not None else row.estimate for row in told], np.float64)
        high = np.array([row.high if row.high is not None else row.estimate for row in told], np.float64)
        reach = 100 * np.maximum([estimate - low, high - estimate], 0.0)
        axes.bar(at, 100 * estimate, 0.5, color=_OBSERVED, yerr=reach, ecolor=_INK, capsize=4, label="estimated")
        axes.plot(
            at, [100 * (row.declared or 0.0) for row in told], "D", color=_DECLARED, markersize=5, label="declared"
        )
        axes.set(ylabel="% of the variance of the raw score", xticks=at, xticklabels=[row.name for row in told])
        axes.grid(axis="x", visible=False)
        axes.legend()

    return draw


def _law(chosen: npt.NDArray[np.int64], law: Floats, label: str) -> Callable[[Axes], None] | None:
    """Ratings of each item, by its rank in the declared law; means over ranks that lie close together on a logarithmic scale."""
    counts = np.bincount(chosen[chosen >= 0], minlength=len(law)).astype(np.float64)
    if not counts.sum():
        return None
    order = np.argsort(-law, kind="stable")
    edges = np.unique(np.geomspace(1, len(law) + 1, _BINS).astype(np.int64))
    sizes = np.diff(edges)
    if not len(sizes):
        return None
    observed = np.add.reduceat(counts[order], edges[:-1] - 1) / sizes
    expected = np.add.reduceat(law[order], edges[:-1] - 1) / sizes * counts.sum()
    middle = np.sqrt(edges[:-1] * (edges[1:] - 1.0))

    def draw(axes: Axes) -> None:
        met = observed > 0
        axes.loglog(middle, expected, "-", color=_DECLARED, label="declared")
        axes.loglog(middle[met], observed[met], "o", color=_OBSERVED, markersize=5, label="observed")
        axes.set(xlabel=label, ylabel="ratings of each")
        axes.legend()

    return draw


def _users(evidence: Evidence) -> npt.NDArray[np.int64]:
    return evidence.user


def _rate(evidence: Evidence) -> Callable[[Axes], None] | None:
    counts, expected, edges = windows(evidence, _STRETCHES_MOST)
    if len(counts) < 2:
        return None
    seconds = np.diff(edges) / 1000.0
    since_s = (edges - edges[0]) / 1000.0

    def draw(axes: Axes) -> None:
        axes.stairs(counts / seconds, since_s, baseline=None, color=_OBSERVED, linewidth=2, label="observed")
        axes.stairs(
            expected / seconds, since_s, baseline=None, color=_DECLARED, linestyle="--", linewidth=1.4, label="declared"
        )
        axes.set(xlabel="event time since the first instant, s", ylabel="ratings / s")
        axes.set_ylim(0, 1.3 * float(max((counts / seconds).max(), (expected / seconds).max())))
        axes.legend()

    return draw


def _genres(evidence: Evidence) -> Callable[[Axes], None] | None:
    catalogue, law = evidence.declared.catalogue, evidence.declared.movie_law
    movie = evidence.movie[evidence.movie >= 0]
    matrix = catalogue.genre_matrix.astype(np.float64)
    if not len(movie) or not matrix.any():
        return None
    observed = 100 * np.bincount(movie, minlength=len(law)) @ matrix / len(movie)
    expected = 100 * law @ matrix
    order = np.argsort(expected)[-20:]

    def draw(axes: Axes) -> None:
        at = np.arange(len(order))
        axes.barh(at, observed[order], 0.6, color=_OBSERVED, label="observed")
        axes.plot(expected[order], at, "D", color=_DECLARED, markersize=4, label="declared")
        axes.set(xlabel="% of ratings", yticks=at)
        axes.set_yticklabels([catalogue.genre_names[n] for n in order], fontsize=8)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")

    return draw


def _lateness(evidence: Evidence) -> Callable[[Axes], None] | None:
    """How many of the late records, and of those out of order, are later than a time."""
    delays = [("declared", _DECLARED, "-"), ("observed", _OBSERVED, "--")]
    found, declared = (np.sort(ms) / 1000.0 for ms in delays_ms(evidence))
    if not len(found) or not len(declared):
        return None

    def draw(axes: Axes) -> None:
        for (label, colour, line), seconds in zip(delays, (declared, found), strict=True):
            some = np.unique(np.linspace(0, len(seconds) - 1, _CURVE).astype(np.int64))
            axes.plot(seconds[some], 100 * (1 - some / len(seconds)), line, color=colour, linewidth=2, label=label)
        axes.set(xlabel="lateness, s", ylabel="% of late records that are later", xscale="log")
        axes.legend()

    return draw
