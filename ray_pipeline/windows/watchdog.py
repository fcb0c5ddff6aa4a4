"""When Spark must be built anew: a policy that decides, and does nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ExecutorWatchdog"]


@dataclass
class ExecutorWatchdog:
    """Executors that die are replaced by RayDP's master; when they stay away, master or executors are beyond that.

    Attributes:
        wanted: executors there should be; 0 = none are watched.
        patience_ms: how long there may be fewer, milliseconds.
    """

    wanted: int
    patience_ms: int = 30_000
    _short_since_ms: int | None = field(default=None, repr=False)

    def observe(self, now_ms: int, alive: int, master_is_gone: bool = False) -> bool:
        """Take a count of executors; whether there have been too few for too long, or nobody is there to replace them."""
        if alive >= self.wanted:
            self._short_since_ms = None
            return False
        if self._short_since_ms is None:
            self._short_since_ms = now_ms
        return master_is_gone or now_ms - self._short_since_ms >= self.patience_ms
