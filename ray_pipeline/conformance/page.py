"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import jinja2

from ray_pipeline.config import Settings
from ray_pipeline.conformance.charts import draw_charts
from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.judge import POWER, ConformanceReport

__all__ = ["number", "render_page"]


def render_page(evidence: Evidence, report: ConformanceReport) -> str:
    """HTML with every check and picture; light or dark as its reader's system is."""
    loader = jinja2.PackageLoader("ray_pipeline.conformance", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(number=number, p=_chance)
    judged = dict.fromkeys(name for row in report.checks for name in row.settings)
    settings = [
        (name, getattr(evidence.declared.settings, name), Settings.model_fields[name].description) for name in judged
    ]
    page = environment.get_template("page.html")
    return page.render(report=report, charts=draw_charts(evidence, report), power=POWER, settings=settings)


def number(value: float | None) -> str:
    """A number for people: whole ones in full, others to five digits."""
    if value is None:
        return ""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}" if abs(value) < 1e12 else f"{int(value)}"
    return f"{value:,.5g}" if abs(value) < 1e4 else f"{value:,.1f}"


def _chance(p_value: float | None) -> str:
    if p_value is None:
        return ""
    return f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"
