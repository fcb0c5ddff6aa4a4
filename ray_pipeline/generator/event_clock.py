"""The event clock: which event time is due at a wall-clock time. Every actor computes it alike, from the same few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["EventClock"]


@dataclass(frozen=True, slots=True)
class EventClock:
    """Goes along with the wall clock, or faster until it has reached it.

    At speed 1 it keeps its distance to the wall clock for ever. At any other it begins in the past, and where it reaches the
    wall clock (the seam) it goes on as the wall clock does.

    Attributes:
        start_ms: event time at ``begin_ms``, epoch milliseconds.
        begin_ms: wall-clock time, epoch milliseconds.
        speed: event time by wall-clock time, ≥ 1; infinite: all up to now is due at once.
    """

    start_ms: int = 0
    begin_ms: int = 0
    speed: float = 1.0

    def event_ms(self, wall_ms: int) -> int:
        """Event time that is reached at a wall-clock time."""
        if self.speed == 1.0:
            return wall_ms + self.start_ms - self.begin_ms
        if math.isinf(self.speed):
            return wall_ms
        return min(self.start_ms + math.floor((wall_ms - self.begin_ms) * self.speed), wall_ms)

    def wall_ms(self, event_ms: int) -> int:
        """Wall-clock time at which an event time is reached: that of the sender's intention."""
        if self.speed == 1.0:
            return event_ms - self.start_ms + self.begin_ms
        if math.isinf(self.speed):
            return event_ms
        return max(self.begin_ms + math.ceil((event_ms - self.start_ms) / self.speed), event_ms)
