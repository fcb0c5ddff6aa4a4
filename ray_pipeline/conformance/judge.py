"""Verdicts over all checks together, so that many checks do not make a false alarm likely."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Counted, Distance, Estimate, Measure, Unchecked
from ray_pipeline.conformance.registry import CHECKS, Check

__all__ = ["FAMILY_WISE_ERROR", "POWER", "ConformanceReport", "Row", "holm", "judge"]

FAMILY_WISE_ERROR = 0.001
"""Probability that any check at all deviates although the stream is as declared."""
POWER = 0.99
"""A difference as large as ``detectable`` deviates with this probability."""


@dataclass(frozen=True, slots=True)
class Row:
    """A check and what came of it.

    Attributes:
        name: of the check.
        settings: the settings that it judges.
        statistic: what was measured.
        unit: of the numbers; empty for a pure number.
        estimate: what was found; None when unchecked.
        low: lower end of the simultaneous confidence interval; None where there is none.
        high: its upper end.
        declared: what the settings make it; None when unchecked.
        detectable: the smallest difference that is found with a probability of 99 %; None where it is not a matter of chance.
        p_value: unadjusted; None where it is not a matter of chance.
        verdict: ``conforms``, ``deviates`` or ``unchecked``.
        reason: why it is unchecked; empty otherwise.
    """

    name: str
    settings: tuple[str, ...]
    statistic: str
    unit: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    declared: float | None = None
    detectable: float | None = None
    p_value: float | None = None
    verdict: str = "unchecked"
    reason: str = ""


@dataclass
class ConformanceReport:
    """All checks.

    Attributes:
        verdict: ``conforms``, ``deviates``, or ``unchecked`` when no check could tell.
        events: how many ratings were judged, repeats included.
        unreadable: how many records beside them were no rating.
        source: where they came from.
        config: digest of the configuration that they were judged against.
        family_wise_error: see :data:`FAMILY_WISE_ERROR`.
        checks: one row a check.
        duration_s: how long it took.
    """

    verdict: str
    events: int
    unreadable: int
    source: str
    config: str
    family_wise_error: float = FAMILY_WISE_ERROR
    checks: list[Row] = field(default_factory=list)
    duration_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def judge(evidence: Evidence, source: str, checks: tuple[Check, ...] = CHECKS) -> ConformanceReport:
    """Carry out every check and decide on all of them together."""
    measured = [(check, check.measure(evidence)) for check in checks]
    chances = {c.name: m.p_value for c, m in measured if isinstance(m, (Estimate, Distance))}
    wrong = holm(chances, FAMILY_WISE_ERROR)
    wrong |= {c.name for c, m in measured if isinstance(m, Counted) and not m.holds}
    level = 1.0 - FAMILY_WISE_ERROR / max(1, len(chances))
    rows = [_row(check, measure, check.name in wrong, level) for check, measure in measured]
    told = [row for row in rows if row.verdict != "unchecked"]
    verdict = "deviates" if wrong else "conforms" if told else "unchecked"
    world, sample = evidence.declared, evidence.raw
    config = world.settings.digest(world.catalogue.digest)
    return ConformanceReport(verdict, len(sample), sample.unreadable, source, config, checks=rows)


def holm(p_values: dict[str, float], error: float) -> set[str]:
    """Which of many hypotheses are rejected, at a family-wise error whatever depends on what (Holm, 1979)."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    rejected: set[str] = set()
    for rank, name in enumerate(ordered):
        if p_values[name] > error / (len(ordered) - rank):
            break
        rejected.add(name)
    return rejected


def _row(check: Check, measure: Measure, wrong: bool, level: float) -> Row:
    head = check.name, check.settings, check.statistic, check.unit
    verdict = "deviates" if wrong else "conforms"
    if isinstance(measure, Unchecked):
        return Row(*head, reason=measure.reason)
    if isinstance(measure, Counted):
        low, high = (measure.low, measure.high) if measure.low < measure.high else (None, None)
        return Row(*head, measure.value, low, high, measure.declared, verdict=verdict)
    if isinstance(measure, Distance):
        return Row(*head, measure.value, declared=0.0, p_value=measure.p_value, verdict=verdict)
    low, high = measure.interval(level)
    detectable = measure.detectable(level, POWER)
    return Row(*head, measure.value, low, high, measure.declared, detectable, measure.p_value, verdict)
