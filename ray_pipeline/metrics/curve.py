"""The plan ahead, and what was delivered beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ray_pipeline.delivery.interface import Epoch
from ray_pipeline.generator.plan import RatePlan

__all__ = ["DeliveredCurve", "planned"]

_APART_MS = 2_000
_KEEP_MS = 300_000
_AHEAD_MS = 600_000
_STEP_MS = 3_000


def planned(generator: Mapping[str, Any], now_ms: int, instead: str | None = None) -> list[tuple[int, float]]:
    """The rate that the plan says, from five minutes ago to ten minutes ahead, as the mean of every three seconds.

    Args:
        generator: record ``generator``.
        now_ms: wall-clock time, epoch milliseconds.
        instead: text of a plan, as if it were set now; None = the plan in force.

    Returns:
        Event time in the middle, epoch milliseconds, and ratings per second; empty before the start.

    Raises:
        PlanError: ``instead`` is malformed.
    """
    event_now_ms = now_ms + int(generator.get("clock_offset_ms", 0))
    epochs = [Epoch.from_record(record) for record in generator.get("epochs", ())]
    if instead is not None:
        epochs = [Epoch(event_now_ms, 0.0, instead, event_now_ms)]
    if not epochs:
        return []
    plan = RatePlan(epochs)
    first = max(event_now_ms - _KEEP_MS, epochs[0].from_ms) // _STEP_MS * _STEP_MS
    edges = range(first, event_now_ms + _AHEAD_MS + 1, _STEP_MS)
    counts = [plan.expected(at) for at in edges]
    return [
        (at + _STEP_MS // 2, (after - before) * 1000 / _STEP_MS)
        for at, before, after in zip(edges, counts, counts[1:], strict=False)
    ]


class DeliveredCurve:
    """The rate delivered, every two seconds of the last five minutes."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, int]] = deque()

    def add(self, now_ms: int, total: int) -> None:
        """Note the total at a wall-clock time, epoch milliseconds; times must not decrease."""
        samples = self._samples
        if samples and total < samples[-1][1]:  # another run
            samples.clear()
        if not samples or now_ms - samples[-1][0] >= _APART_MS:
            samples.append((now_ms, total))
        while samples[0][0] < now_ms - _KEEP_MS:
            samples.popleft()

    def points(self) -> list[tuple[int, float]]:
        """Wall-clock time in the middle of two samples, epoch milliseconds, and ratings per second between them."""
        samples = list(self._samples)
        return [
            ((at + after) // 2, (total - before) * 1000 / (after - at))
            for (at, before), (after, total) in pairwise(samples)
        ]
