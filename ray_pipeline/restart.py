"""Whether to try again after a failure: a policy that decides, and does nothing."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

__all__ = ["Decision", "RestartPolicy"]


class Decision(enum.Enum):
    """What to do after a failure."""

    RESTART = "restart"
    GIVE_UP = "give up"


@dataclass
class RestartPolicy:
    """Restart, unless failures come too often.

    Attributes:
        most: failures allowed within the span.
        span_ms: length of the span, milliseconds.
        first_backoff_s: wait after the first failure, seconds; doubles up to ``longest_backoff_s``.
        longest_backoff_s: longest wait, seconds.
    """

    most: int = 20
    span_ms: int = 300_000
    first_backoff_s: float = 0.1
    longest_backoff_s: float = 5.0
    _failures_ms: deque[int] = field(default_factory=deque)

    def failed(self, now_ms: int) -> Decision:
        """Note a failure and decide."""
        self._failures_ms.append(now_ms)
        while self._failures_ms[0] < now_ms - self.span_ms:
            self._failures_ms.popleft()
        return Decision.GIVE_UP if len(self._failures_ms) > self.most else Decision.RESTART

    @property
    def backoff_s(self) -> float:
        """How long to wait before the restart, seconds."""
        return min(self.longest_backoff_s, self.first_backoff_s * 2.0 ** max(0, len(self._failures_ms) - 1))
