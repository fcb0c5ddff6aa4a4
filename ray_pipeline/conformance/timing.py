"""Checks of when ratings are due: start, rate, arrival law, end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Counted, Estimate, Measure, Unchecked

__all__ = ["amount", "arrivals", "rate", "start", "windows"]

_WINDOW_RATINGS = 100
_WINDOW_MS = 50
_WINDOWS_FEWEST, _WINDOWS_MOST = 20, 10_000
_REGULAR_MOST = 0.25
_FIRST = 101
_ON_TIME_LEAST = 0.6
_TOO_FEW = f"fewer than {_ON_TIME_LEAST:.0%} of the records are on time"


def start(evidence: Evidence) -> Measure:
    """Event time of the first rating; where event times are wrong on purpose, by the first ones that are on time."""
    schedules = evidence.declared.schedules
    declared = min(int(s.due_ms(0, 1)[0]) for s in schedules.values())
    if not evidence.broken_on_purpose:
        return Counted.exactly(int(evidence.sample.timestamps_ms.min()), declared)
    if evidence.on_time_share < _ON_TIME_LEAST:
        return Unchecked(_TOO_FEW)
    shifts_ms = []
    for partition, known in evidence.on_time.items():
        index = known.index[:_FIRST]
        if partition in schedules and len(index):
            due_ms = schedules[partition].due_ms(0, int(index[-1]) + 1)[index]
            shifts_ms.append(int(np.median(known.times_ms[:_FIRST] - due_ms)))
    return Counted.exactly(declared + min(shifts_ms), declared) if shifts_ms else Unchecked(_TOO_FEW)


def rate(evidence: Evidence) -> Measure:
    """Ratings a second of event time, up to where all partitions are known, against the plan's mean rate over the same time."""
    declared, through_ms = evidence.declared, evidence.through_ms
    elapsed_s = (through_ms + 1 - declared.start_ms) / 1000.0
    if elapsed_s <= 0:
        return Unchecked("a partition has no rating yet")
    if evidence.broken_on_purpose and evidence.on_time_share < _ON_TIME_LEAST:
        return Unchecked(_TOO_FEW)
    count = float(evidence.due_by(np.array([through_ms]))[0])
    plan = declared.plan
    if declared.settings.arrivals == "poisson":
        due = plan.expected(through_ms + 1)
        return Estimate(count / elapsed_s, max(1.0, due) ** 0.5 / elapsed_s, due / elapsed_s)
    # each shard's phase moves it by less than a rating
    reach = declared.settings.partitions + plan.rate_at(through_ms) / 1000.0
    planned = plan.expected(through_ms + 1)
    return Counted(count / elapsed_s, planned / elapsed_s, (count - reach) / elapsed_s, (count + reach) / elapsed_s)


def arrivals(evidence: Evidence) -> Measure:
    """Variance over mean of the ratings in equal stretches of the plan: 0 when they come like clockwork, 1 when at random."""
    if evidence.broken_on_purpose and evidence.on_time_share < _ON_TIME_LEAST:
        return Unchecked(_TOO_FEW)
    counts, expected, _ = windows(evidence)
    if len(counts) < _WINDOWS_FEWEST:
        return Unchecked(f"fewer than {_WINDOWS_FEWEST} stretches of {_WINDOW_MS} ms with ratings enough")
    there = expected > 0  # in a pause of the plan nothing must come, which the rate shows
    index = float(((counts - expected)[there] ** 2 / expected[there]).mean())
    if evidence.declared.settings.arrivals == "poisson":
        variance = (2.0 + 1.0 / expected[there]).mean() / there.sum()
        return Estimate(index, float(variance) ** 0.5, 1.0)
    return Counted(index, 0.0, max(0.0, index - _REGULAR_MOST), index)


def amount(evidence: Evidence) -> Measure:
    """How many ratings there are, of a run that has ended by itself."""
    declared = evidence.declared.declared_total
    if declared is None:
        return Unchecked("the settings name no end")
    if not evidence.sample.whole:
        return Unchecked("these are not all ratings of a run that has ended")
    return Counted.exactly(evidence.records, declared)


def windows(
    evidence: Evidence, most: int = _WINDOWS_MOST
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Ratings due in equal stretches of event time, and how many of them the plan has there.

    Args:
        evidence: sample and plan.
        most: no more stretches than these.

    Returns:
        Counts, shape (stretches,); planned counts, shape (stretches,); edges, epoch milliseconds, shape (stretches + 1,).
    """
    declared = evidence.declared
    plan = declared.plan
    start_ms, end_ms = declared.start_ms, evidence.through_ms
    planned = plan.expected(end_ms)
    if planned <= 0:
        return np.empty(0), np.empty(0), np.array([start_ms], np.int64)
    stretches = int(min(planned / _WINDOW_RATINGS, (end_ms - start_ms) / _WINDOW_MS, most))
    edges = np.linspace(start_ms, end_ms, max(1, stretches) + 1).astype(np.int64)
    counts = np.diff(evidence.due_by(edges - 1))
    expected = np.diff([plan.expected(int(edge)) for edge in edges])
    return counts, expected, edges
