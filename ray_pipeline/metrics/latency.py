"""How long from a rating's creation until its windows can be read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LatencyMeter"]

_KEEP_MS = 30_000
_POINTS = 16

DueTimes = Callable[[str, npt.NDArray[np.int64]], "npt.NDArray[np.int64] | None"]
"""Of a partition's ratings, by their indexes, the event times at which they were due, as far as they can be told; None: not at all."""


class LatencyMeter:
    """Measures at the reader: when a micro-batch's record arrives here, the batch's windows are here already.

    A batch says, by partition, how many ratings it took in and the event time of the newest. When some of them were created is asked of
    the shard's schedule: after a pause they all lie behind it. Without one they are spread evenly from the one before: at a constant
    rate that is where they are. Creation is the intended time, so a sender that lags is not hidden.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}
        self._samples: deque[tuple[int, float, float]] = deque()  # received, latency in ms, weight

    def add(
        self,
        partitions: Mapping[str, Mapping[str, Any]],
        received_ms: int,
        clock_offset_ms: int,
        live: bool,
        due: DueTimes = lambda *_: None,
    ) -> None:
        """Take a job record in.

        Args:
            partitions: its ``partitions``; of ``records`` those whose times are asked for.
            received_ms: when it arrived, epoch milliseconds.
            clock_offset_ms: event time minus wall clock.
            live: whether it was just written; an older one only says where the next begins.
            due: tells when ratings were due.
        """
        for name, said in partitions.items():
            records, newest_ms = int(said["records"]), int(said["max_event_ms"])
            before = self._seen.get(name)
            self._seen[name] = (records, newest_ms)
            if not live or before is None or records <= before[0]:
                continue
            points = min(_POINTS, records - before[0])
            times = due(name, records - 1 - np.arange(points) * (records - before[0]) // points)
            if times is None and newest_ms > before[1]:
                times = newest_ms - np.arange(points) * (newest_ms - before[1]) // points
            for created_ms in [] if times is None else times.tolist():
                latency_ms = received_ms - (created_ms - clock_offset_ms)
                self._samples.append((received_ms, latency_ms, (records - before[0]) / points))
        while self._samples and self._samples[0][0] < received_ms - _KEEP_MS:
            self._samples.popleft()

    def percentiles(self, now_ms: int, shares: tuple[float, ...] = (0.5, 0.95)) -> tuple[float, ...] | None:
        """Latencies in milliseconds over the last 30 s; None when nothing came in."""
        live = sorted((latency, weight) for at_ms, latency, weight in self._samples if at_ms >= now_ms - _KEEP_MS)
        total = sum(weight for _, weight in live)
        if not live:
            return None
        found = []
        for share in shares:
            left = share * total
            found.append(live[-1][0])
            for latency, weight in live:
                left -= weight
                if left <= 1e-9:
                    found[-1] = latency
                    break
        return tuple(found)
