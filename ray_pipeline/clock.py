"""Time as an argument: a real clock, and one that a test moves by hand."""

from __future__ import annotations

import threading
import time
from typing import Protocol

__all__ = ["LAST_MS", "Clock", "FakeClock", "SystemClock"]

LAST_MS = 253_402_300_799_999
"""The end of the year 9999, epoch milliseconds: no later time can be written, and Spark prints none."""


class Clock(Protocol):
    """What the rest of the package knows of time."""

    def now_ms(self) -> int:
        """Wall-clock time, milliseconds since 1970-01-01 UTC."""
        ...

    def wait(self, wake: threading.Event, timeout_s: float) -> bool:
        """Block until ``wake`` is set or ``timeout_s`` seconds passed; True when it was set."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        """Wall-clock time, milliseconds since 1970-01-01 UTC."""
        return time.time_ns() // 1_000_000

    def wait(self, wake: threading.Event, timeout_s: float) -> bool:
        """Block until ``wake`` is set or ``timeout_s`` seconds passed."""
        return wake.wait(max(timeout_s, 0.0))


class FakeClock:
    """A clock that moves only when told to; ``wait`` moves it by the time asked for.

    Args:
        now_ms: where it starts, milliseconds since 1970-01-01 UTC.
    """

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._now_us = now_ms * 1000

    def now_ms(self) -> int:
        """The time it was moved to."""
        return self._now_us // 1000

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds`` (≥ 0)."""
        self._now_us += round(seconds * 1_000_000)

    def wait(self, wake: threading.Event, timeout_s: float) -> bool:
        """Move by ``timeout_s`` instead of blocking, unless ``wake`` is set already."""
        if wake.is_set():
            return True
        self.advance(max(timeout_s, 0.0))
        return False
