"""What a storm did and what became of it, in numbers. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["MemorySeries", "Outcome", "StormReport", "as_table", "percentile", "slope_mib_per_min"]

_MIB = 1024.0 * 1024.0
_MOST_POINTS = 400
_WARM_UP_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Outcome:
    """A fault and the recovery from it.

    Attributes:
        number: its place in the plan.
        kind: what was done.
        overlapping: whether the pipeline had not recovered from the one before.
        begun_s: when, seconds since the storm began.
        detail: what was hit.
        phase: where in a commit, see ``inject.phase_of``; empty for other kinds.
        skipped: why nothing was done; empty when something was.
        at_rate_s: until the generator was back at the set rate, seconds; None when it was not.
        fresh_s: until the windows were fresh, seconds; None when they were not.
        api_s: until the API answered, seconds; None when it did not.
        failed: what had not recovered in time, or disagreed; empty when all was well.
    """

    number: int
    kind: str
    overlapping: bool
    begun_s: float
    detail: str
    skipped: str = ""
    at_rate_s: float | None = None
    fresh_s: float | None = None
    api_s: float | None = None
    failed: str = ""
    phase: str = ""


@dataclass
class MemorySeries:
    """Resident memory by role over time."""

    at_s: list[float] = field(default_factory=list)
    bytes_of: dict[str, list[float]] = field(default_factory=dict)

    def add(self, at_s: float, bytes_of: Mapping[str, int]) -> None:
        """Take one look at all roles; a role that has no process just now has no value."""
        for role in bytes_of:
            self.bytes_of.setdefault(role, [math.nan] * len(self.at_s))
        self.at_s.append(at_s)
        for role, series in self.bytes_of.items():
            series.append(float(bytes_of.get(role, math.nan)))

    def slopes(self) -> dict[str, dict[str, float]]:
        """By role: ``mib`` at the end (median of the last tenth), and ``mib_per_min``."""
        return {
            role: {
                "mib": round(float(np.nanmedian(series[-max(1, len(series) // 10) :])) / _MIB, 1),
                "mib_per_min": round(slope_mib_per_min(self.at_s, series), 3),
            }
            for role, series in sorted(self.bytes_of.items())
            if not math.isnan(float(np.nanmax([0.0, *series[-max(1, len(series) // 10) :]])))
            and not all(math.isnan(value) for value in series[-max(1, len(series) // 10) :])
        }


def slope_mib_per_min(at_s: Sequence[float], memory_bytes: Sequence[float]) -> float:
    """Median slope over all pairs of points after the first fifth, MiB a minute; restarts in between hardly move it.

    Theil–Sen estimator (Sen 1968). 0 with fewer than 3 points.
    """
    at, memory = np.asarray(at_s, float), np.asarray(memory_bytes, float)
    keep = ~np.isnan(memory)
    if keep.any():
        keep &= at >= at[0] + _WARM_UP_SHARE * (at[-1] - at[0])
    at, memory = at[keep], memory[keep]
    if len(at) < 3:
        return 0.0
    step = max(1, len(at) // _MOST_POINTS)
    at, memory = at[::step], memory[::step]
    first, second = np.triu_indices(len(at), 1)
    apart = at[second] - at[first]
    return float(np.median((memory[second] - memory[first])[apart > 0] / apart[apart > 0])) * 60.0 / _MIB


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest rank; None without values."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(share * len(ordered) - 1e-9)) - 1] if ordered else None


def _times(values: Sequence[float]) -> dict[str, float | None]:
    return {
        "p50": percentile(values, 0.5),
        "p95": percentile(values, 0.95),
        "max": max(values, default=None),
    }


@dataclass(frozen=True, slots=True)
class StormReport:
    """A whole storm.

    Attributes:
        seed: of the plan.
        duration_s: how long the storm lasted, seconds.
        rate: the rate at the start, ratings per second.
        outcomes: fault by fault.
        memory: memory by role, see :meth:`MemorySeries.slopes`.
        restarts: how often each part was started again.
        audit: what the audit at the end says; None when there was none.
        aborted: why the storm ended early; empty when it did not.
    """

    seed: int
    duration_s: float
    rate: float
    outcomes: tuple[Outcome, ...]
    memory: Mapping[str, Mapping[str, float]]
    restarts: Mapping[str, int]
    audit: Mapping[str, Any] | None
    aborted: str = ""

    @property
    def verdict(self) -> str:
        """``survived``, ``failed`` or ``unchecked``."""
        if self.aborted or any(outcome.failed for outcome in self.outcomes):
            return "failed"
        said = str(self.audit["verdict"]) if self.audit is not None else "unchecked"
        return {"agreed": "survived", "disagreed": "failed"}.get(said, "unchecked")

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        done = [outcome for outcome in self.outcomes if not outcome.skipped]
        records, windows = (dict((self.audit or {}).get(name, {})) for name in ("records", "windows"))
        return {
            "verdict": self.verdict,
            "seed": self.seed,
            "duration_s": round(self.duration_s, 1),
            "rate": self.rate,
            "faults": {
                "injected": len(done),
                "overlapping": sum(outcome.overlapping for outcome in done),
                "skipped": len(self.outcomes) - len(done),
                "not_recovered": sum(bool(outcome.failed) for outcome in done),
            },
            "time_to_rate_s": _times([o.at_rate_s for o in done if o.at_rate_s is not None]),
            "time_to_fresh_windows_s": _times([o.fresh_s for o in done if o.fresh_s is not None]),
            "by_kind": {kind: self._of_kind(kind, done) for kind in sorted({o.kind for o in done})},
            "commit_phases_hit": dict(Counter(o.phase for o in done if o.phase)),
            "records_checked": records.get("found"),
            "gaps": records.get("missing"),
            "repeats": records.get("repeated"),
            "windows_checked": windows.get("checked"),
            "wrong_windows": windows.get("wrong"),
            "late_dropped": windows.get("late_dropped"),
            "memory": {role: dict(values) for role, values in self.memory.items()},
            "restarts": dict(self.restarts),
            "aborted": self.aborted,
            "audit": self.audit,
            "outcomes": [
                {name: getattr(outcome, name) for name in Outcome.__dataclass_fields__} for outcome in self.outcomes
            ],
        }

    @staticmethod
    def _of_kind(kind: str, done: Sequence[Outcome]) -> dict[str, Any]:
        mine = [outcome for outcome in done if outcome.kind == kind]
        return {
            "count": len(mine),
            "time_to_rate_s": _times([o.at_rate_s for o in mine if o.at_rate_s is not None]),
            "time_to_fresh_windows_s": _times([o.fresh_s for o in mine if o.fresh_s is not None]),
            "time_to_api_s": _times([o.api_s for o in mine if o.api_s is not None]),
            "not_recovered": sum(bool(o.failed) for o in mine),
        }


def as_table(report: Mapping[str, Any]) -> str:
    """A report as Markdown, without anything of the machine it was made on.

    Args:
        report: :meth:`StormReport.as_dict`.
    """
    faults = report["faults"]
    lines = [
        f"**{report['verdict']}**: {faults['injected']} faults in {report['duration_s'] / 60:.0f} min (seed {report['seed']}, "
        f"{faults['overlapping']} overlapping, {faults['skipped']} skipped, {faults['not_recovered']} not recovered from in time)",
        "",
        "| checked at the end | |",
        "|---|---:|",
    ]
    names = ("records_checked", "gaps", "repeats", "windows_checked", "wrong_windows", "late_dropped")
    lines += [f"| {name.replace('_', ' ')} | {_number(report[name])} |" for name in names]
    lines += [
        "",
        "| fault | times | back at the set rate, s: p50 / p95 / max | windows fresh, s: p50 / p95 / max | not recovered |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, row in report["by_kind"].items():
        lines.append(
            f"| {kind} | {row['count']} | {_three(row['time_to_rate_s'])} | {_three(row['time_to_fresh_windows_s'])} "
            f"| {row['not_recovered']} |"
        )
    lines.append(
        f"| all | {faults['injected']} | {_three(report['time_to_rate_s'])} | {_three(report['time_to_fresh_windows_s'])} "
        f"| {faults['not_recovered']} |"
    )
    if report["commit_phases_hit"]:
        lines += ["", "| killed relative to a commit | times |", "|---|---:|"]
        lines += [f"| {phase} | {count} |" for phase, count in sorted(report["commit_phases_hit"].items())]
    lines += ["", "| started again | times |", "|---|---:|"]
    lines += [f"| {part} | {count} |" for part, count in report["restarts"].items()]
    lines += ["", "| process | memory at the end, MiB | slope, MiB/min |", "|---|---:|---:|"]
    lines += [f"| {role} | {of['mib']:,.0f} | {of['mib_per_min']:+.2f} |" for role, of in report["memory"].items()]
    return "\n".join(lines) + "\n"


def _three(times: Mapping[str, float | None]) -> str:
    return " / ".join("–" if times[name] is None else f"{times[name]:.1f}" for name in ("p50", "p95", "max"))


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:,}"
