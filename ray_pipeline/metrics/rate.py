"""The rate at which a running total grows."""

from __future__ import annotations

from collections import deque

__all__ = ["RateMeter"]

_APART_MS = 100
_WINDOW_MS = 2_000
_LEAST_EVENTS = 10
_MISSED = 5
_MINUTE_MS = 60_000
_LATE_MS = 10_000


class RateMeter:
    """Measures from (time, total) samples, which it keeps for a minute.

    The rate is that of the last two seconds, so that a change shows at once; where fewer than ten came in that time it
    looks back further, up to a minute, so that slow streams have a rate too. When five that were to be expected have not been
    heard of for two seconds or longer, it is 0. News that come late, up to ten seconds, are no silence.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[int, int]] = deque()
        self._grown_ms = 0
        self._heard_ms = 0

    def add(self, now_ms: int, total: int, heard_ms: int | None = None) -> None:
        """Note the total at a time, and when that was heard of (None = at once); times must not decrease."""
        heard_ms = now_ms if heard_ms is None or heard_ms - now_ms > _LATE_MS else max(heard_ms, now_ms)
        samples = self._samples
        if samples and total < samples[-1][1]:  # another run
            samples.clear()
        if not samples or total > samples[-1][1]:
            self._grown_ms, self._heard_ms = now_ms, heard_ms
        if len(samples) > 1 and now_ms - samples[-2][0] < _APART_MS:
            samples[-1] = (now_ms, total)
        else:
            samples.append((now_ms, total))
        while len(samples) > 2 and samples[1][0] <= now_ms - _MINUTE_MS:
            samples.popleft()

    def rate(self, now_ms: int) -> float:
        """Events per second."""
        if not self._samples:
            return 0.0
        last_total = self._samples[-1][1]
        silent_ms = now_ms - self._heard_ms
        if silent_ms >= _WINDOW_MS and self._before_silence() * silent_ms > _MISSED * 1000:
            return 0.0
        # up to the last growth: what came after it has not been heard of yet, rather than not come
        end_ms = self._grown_ms if silent_ms < _WINDOW_MS else now_ms
        window_ms = _WINDOW_MS
        while True:
            at_ms, total = self._at(end_ms - window_ms)
            if last_total - total >= _LEAST_EVENTS or window_ms >= _MINUTE_MS or at_ms == self._samples[0][0]:
                return (last_total - total) * 1000.0 / max(end_ms - at_ms, _APART_MS)
            window_ms *= 2

    def last_minute(self, now_ms: int) -> int:
        """Events in the last 60 seconds (or since the first sample)."""
        return self._samples[-1][1] - self._at(now_ms - _MINUTE_MS)[1] if self._samples else 0

    def _before_silence(self) -> float:
        """Events per second over the samples until the total last grew."""
        first_ms, first_total = self._samples[0]
        return (self._samples[-1][1] - first_total) * 1000.0 / max(self._grown_ms - first_ms, _APART_MS)

    def _at(self, at_ms: int) -> tuple[int, int]:
        """The newest sample at or before a time; else the first."""
        found = self._samples[0]
        for sample in self._samples:
            if sample[0] > at_ms:
                break
            found = sample
        return found
