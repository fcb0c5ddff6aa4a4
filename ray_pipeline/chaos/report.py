"""What a storm did and what became of it, in numbers. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ray_pipeline.chaos.plan import KINDS, OF_OWN, Kind
from ray_pipeline.metrics.verdicts import Tally

__all__ = [
    "GOALS",
    "Audited",
    "Goal",
    "MemorySeries",
    "Outcome",
    "StormReport",
    "as_table",
    "percentile",
    "slope_mib_per_min",
]

_MIB = 1024.0 * 1024.0
_MOST_POINTS = 400
_WARM_UP_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Audited:
    """An audit of all that there was so far, made while ratings flowed.

    Attributes:
        verdict: ``agreed``, ``disagreed`` or ``unchecked``.
        records: records that were compared.
        windows: windows that were compared, open ones too.
        duration_s: how long it took, seconds.
    """

    verdict: str
    records: int
    windows: int
    duration_s: float


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
        failed: what was refused, had not recovered in time, or disagreed; empty when all was well.
        oracle_s: until the oracle had compared what the job had read, seconds; None when it had not.
        untold: of what it could not be told whether it agrees; empty when all could.
        audit: the audit after the recovery, the same one for faults that overlap; None when there was none.
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
    oracle_s: float | None = None
    untold: str = ""
    audit: Audited | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """How soon something must be well again.

    Attributes:
        what: in words.
        limit_s: seconds.
        share: of the faults, those that are the slowest left out; 1 = all of them.
        time: which time of an :class:`Outcome`.
        kinds: after which faults.
    """

    what: str
    limit_s: float
    share: float
    time: str
    kinds: tuple[Kind, ...]

    def judge(self, done: Sequence[Outcome]) -> dict[str, Any]:
        """``what``, ``limit_s``, ``found_s``, ``met``.

        Without such a fault the last two are None; with one after which it was not well again in time, ``found_s`` is.
        """
        times = [getattr(outcome, self.time) for outcome in done if outcome.kind in self.kinds]
        found_s = percentile([math.inf if time is None else time for time in times], self.share)
        return {
            "what": self.what,
            "limit_s": self.limit_s,
            "found_s": found_s if found_s is None or math.isfinite(found_s) else None,
            "met": None if found_s is None else found_s <= self.limit_s,
        }


_OF_SPARK = (Kind.KILL_EXECUTOR, Kind.KILL_DRIVER, Kind.KILL_MASTER)
GOALS = (
    Goal("back at the set rate, p95", 10.0, 0.95, "at_rate_s", tuple(kind for kind in KINDS if kind not in OF_OWN)),
    Goal("windows fresh after a kill of Spark's, max", 60.0, 1.0, "fresh_s", _OF_SPARK),
)
"""What is aimed at; a storm that misses one has not failed, it shows by how much."""


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
        aborted: why the storm ended early, or what was not in order at its end; empty when all was.
        windows: the verdicts on windows at its end, before the audit; None when nobody looked.
        conditions: what the storm made of a pipeline of its own, whole sentences; empty when it broke one that ran.
        audits: those that were made during the storm.
    """

    seed: int
    duration_s: float
    rate: float
    outcomes: tuple[Outcome, ...]
    memory: Mapping[str, Mapping[str, float]]
    restarts: Mapping[str, int]
    audit: Mapping[str, Any] | None
    aborted: str = ""
    windows: Tally | None = None
    conditions: str = ""
    audits: tuple[Audited, ...] = ()

    @property
    def _judged(self) -> tuple[str, str]:
        failed = [
            f"fault {outcome.number}, {outcome.kind}: {outcome.failed}" for outcome in self.outcomes if outcome.failed
        ]
        if self.aborted or failed:
            return "failed", self.aborted or failed[0]
        if self.audit is not None and self.audit["verdict"] == "disagreed":
            return "failed", "the audit found records or windows that are wrong"
        if self.audit is None or self.audit["verdict"] != "agreed":
            return "unchecked", str((self.audit or {}).get("reason") or "there was no audit")
        windows = self.audit["windows"]
        if windows.get("reason") or not windows["checked"]:
            return "unchecked", windows.get("reason") or "the audit found no window to check"
        if all(outcome.skipped for outcome in self.outcomes):
            return "unchecked", "nothing was done to the pipeline"
        return "survived", ""

    @property
    def verdict(self) -> str:
        """``survived``, ``failed`` or ``unchecked``: the audit could not compare, or nothing was done."""
        return self._judged[0]

    @property
    def reason(self) -> str:
        """Why it has not survived; empty when it has."""
        return self._judged[1]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        done = [outcome for outcome in self.outcomes if not outcome.skipped]
        records, windows = (dict((self.audit or {}).get(name, {})) for name in ("records", "windows"))
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "conditions": self.conditions,
            "seed": self.seed,
            "duration_s": round(self.duration_s, 1),
            "rate": self.rate,
            "faults": {
                "injected": len(done),
                "overlapping": sum(outcome.overlapping for outcome in done),
                "skipped": len(self.outcomes) - len(done),
                "not_recovered": sum(bool(outcome.failed) for outcome in done),
                "untold": sum(bool(outcome.untold) for outcome in done),
            },
            "goals": [goal.judge(done) for goal in GOALS],
            "audits": {
                "made": len(self.audits),
                "agreed": sum(made.verdict == "agreed" for made in self.audits),
                "records_checked": sum(made.records for made in self.audits),
                "windows_checked": sum(made.windows for made in self.audits),
                "duration_s": _times([made.duration_s for made in self.audits]),
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
            "windows_live": None if self.windows is None else asdict(self.windows),
            "memory": {role: dict(values) for role, values in self.memory.items()},
            "restarts": dict(self.restarts),
            "aborted": self.aborted,
            "audit": self.audit,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }

    @staticmethod
    def _of_kind(kind: str, done: Sequence[Outcome]) -> dict[str, Any]:
        mine = [outcome for outcome in done if outcome.kind == kind]
        return {
            "count": len(mine),
            "time_to_rate_s": _times([o.at_rate_s for o in mine if o.at_rate_s is not None]),
            "time_to_fresh_windows_s": _times([o.fresh_s for o in mine if o.fresh_s is not None]),
            "time_to_api_s": _times([o.api_s for o in mine if o.api_s is not None]),
            "time_to_oracle_s": _times([o.oracle_s for o in mine if o.oracle_s is not None]),
            "not_recovered": sum(bool(o.failed) for o in mine),
        }


def as_table(report: Mapping[str, Any]) -> str:
    """A report as Markdown, without anything of the machine it was made on.

    Args:
        report: :meth:`StormReport.as_dict`.
    """
    faults, audits = report["faults"], report["audits"]
    lines = [
        f"**{report['verdict']}**: {faults['injected']} faults in {report['duration_s'] / 60:.0f} min (seed {report['seed']}, "
        f"{faults['overlapping']} overlapping, {faults['skipped']} skipped, {faults['not_recovered']} not recovered from in time)",
        *(("", f"Because: {report['reason']}.") if report["reason"] else ()),
        *(("", report["conditions"]) if report["conditions"] else ()),
        "",
        "| goal | at most, s | found, s | |",
        "|---|---:|---:|---|",
        *(_goal(goal) for goal in report["goals"]),
        "",
        "| compared after each fault | |",
        "|---|---:|",
        f"| audits of all records and windows so far | {audits['made']} |",
        f"| of these, agreed | {audits['agreed']} |",
        f"| records that they compared, over all | {_number(audits['records_checked'])} |",
        f"| windows that they compared, over all | {_number(audits['windows_checked'])} |",
        f"| an audit, s: p50 / p95 / max | {_three(audits['duration_s'])} |",
        f"| faults after which not all could be compared | {faults['untold']} |",
        *(f"| windows {name} | {_number((report['windows_live'] or {}).get(field))} |" for name, field in _LIVE),
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


_LIVE = (
    ("verified", "verified"),
    ("verified, with ratings that came too late for them", "late"),
    ("still open, or not compared yet", "pending"),
    ("wrong", "wrong"),
)


def _goal(goal: Mapping[str, Any]) -> str:
    found = "–" if goal["found_s"] is None else f"{goal['found_s']:.1f}"
    met = {True: "met", False: "missed", None: "not tried"}[goal["met"]]
    return f"| {goal['what']} | {goal['limit_s']:g} | {found} | {met} |"


def _three(times: Mapping[str, float | None]) -> str:
    return " / ".join("–" if times[name] is None else f"{times[name]:.1f}" for name in ("p50", "p95", "max"))


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:,}"
