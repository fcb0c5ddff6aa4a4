"""Windows that open by a cron expression, in a time zone, with its summer time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from importlib import resources
from zoneinfo import ZoneInfo

import numpy as np
from cronsim import CronSim, CronSimError

from ray_pipeline.rates.shapes import NANO, UNIT, Table, Times, total

__all__ = ["CronWindows", "zone_of"]

_CHUNK_MS = 32 * 86_400_000
_CHUNKS_KEPT = 32
_MINUTE_MS = 60_000
_PER_UNIT = NANO * 1000 // UNIT


@lru_cache(maxsize=64)
def zone_of(name: str) -> tzinfo:
    """A time zone of the pinned package ``tzdata``, not of the machine: every reader must find the same hours.

    Raises:
        ValueError: there is no such zone.
    """
    if name == "UTC":
        return UTC  # cron expressions are counted much faster in it
    parts = name.split("/")
    if not all(part.replace("_", "").replace("-", "").replace("+", "").isalnum() for part in parts):
        raise ValueError(name)
    try:
        with resources.files("tzdata").joinpath("zoneinfo", *parts).open("rb") as file:
            return ZoneInfo.from_file(file, key=name)
    except OSError:
        raise ValueError(name) from None


class CronWindows:
    """A rate in windows that open when a cron expression says so; where they overlap, it is not doubled.

    The windows are counted a month at a time; of the months that were left behind, only their sums are kept.

    Args:
        expression: five fields; fixed hours that summer time leaves out open right after the gap, as Debian's cron has it.
        zone: whose wall clock the expression means.
        length_ms: how long each window is, milliseconds, > 0.
        rate: per ``NANO`` seconds.
        zero_ms: the shape's own beginning, epoch milliseconds UTC.

    Raises:
        ValueError: the expression is malformed, or never comes true.
    """

    length_ms: int | None = None

    def __init__(self, expression: str, zone: tzinfo, length_ms: int, rate: int, zero_ms: int) -> None:
        if len(expression.split()) != 5:
            msg = "it must have five fields: minute, hour, day of month, month, day of week"
            raise ValueError(msg)
        self.peak = rate
        self._expression = expression
        self._zone = zone
        self._window_ms = length_ms
        self._zero_ms = zero_ms
        self._before = [0]
        self._chunk = lru_cache(_CHUNKS_KEPT)(self._make_chunk)
        try:
            next(CronSim(expression, datetime(2024, 1, 1, tzinfo=UTC)))
        except CronSimError as error:
            raise ValueError(str(error).lower()) from None
        except StopIteration:
            msg = "it never comes true"
            raise ValueError(msg) from None

    def upto(self, times: Times) -> Times:
        """See :meth:`Shape.upto`."""
        which = times // _CHUNK_MS
        found = np.empty(times.shape, np.int64)
        for n in np.unique(which).tolist():
            here = which == n
            found[here] = self._units_before(n) + self._chunk(n).upto(times[here] - n * _CHUNK_MS)
        return found

    def knots(self, from_ms: int, to_ms: int) -> Times:
        """See :meth:`Shape.knots`."""
        parts = [np.empty(0, np.int64)]
        for n in range(from_ms // _CHUNK_MS, max(0, -(-to_ms // _CHUNK_MS))):
            start = n * _CHUNK_MS
            parts.append(self._chunk(n).knots(max(0, from_ms - start), min(to_ms - start, _CHUNK_MS)) + start)
        return np.concatenate(parts)

    def most_knots(self, span_ms: int) -> int:
        """See :meth:`Shape.most_knots`."""
        return 2 * (span_ms // _MINUTE_MS + 2) + 2 * (span_ms // _CHUNK_MS + 2)

    def _units_before(self, chunk: int) -> int:
        while len(self._before) <= chunk:
            self._before.append(self._before[-1] + total(self._chunk(len(self._before) - 1)))
        return self._before[chunk]

    def _make_chunk(self, n: int) -> Table:
        times, units, open_ms = [0], [0], 0
        for begin, end in self._windows(n * _CHUNK_MS, (n + 1) * _CHUNK_MS):
            for at, more in ((begin, 0), (end, end - begin)):
                open_ms += more
                if at > times[-1]:
                    times.append(at)
                    units.append(open_ms * self.peak // _PER_UNIT)
        if times[-1] < _CHUNK_MS:
            times.append(_CHUNK_MS)
            units.append(units[-1])
        return Table(times, units, self.peak)

    def _windows(self, from_ms: int, to_ms: int) -> list[tuple[int, int]]:
        """Windows as they fall into a span, from its beginning, overlapping ones as one."""
        first = datetime.fromtimestamp((self._zero_ms + from_ms - self._window_ms) / 1000, self._zone)
        found: list[tuple[int, int]] = []
        for opens in CronSim(self._expression, first - timedelta(hours=3)):
            begin = round(opens.timestamp() * 1000) - self._zero_ms
            if begin >= to_ms:
                break
            end = min(begin + self._window_ms, to_ms) - from_ms
            begin = max(begin, from_ms) - from_ms
            if found and begin <= found[-1][1]:
                found[-1] = (found[-1][0], max(end, found[-1][1]))
            elif end > begin:
                found.append((begin, end))
        return found
