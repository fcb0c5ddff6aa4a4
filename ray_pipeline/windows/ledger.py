"""How many ratings the tumbling windows have counted, closed windows included, across restarts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CountLedger"]


class CountLedger:
    """Sums the counts of tumbling windows.

    The state forgets a window when it closes, and the process may end at any moment. So what is told of a micro-batch has the counts
    of all windows that were open when it began: whether it was committed or runs again, a restart can tell by the watermark of the
    state which of them are closed, which are in the state, and which will be counted anew.
    """

    def __init__(self) -> None:
        self._closed = 0  # ratings of windows that an earlier micro-batch had closed
        self._closed_windows = 0
        self._counts: dict[int, int] = {}  # of the others, by end
        self._watermark_ms = 0

    @property
    def counted(self) -> int:
        """Ratings counted in tumbling windows since the first record of the topic."""
        return self._closed + sum(self._counts.values())

    def set(self, end_ms: int, count: int) -> None:
        """Note the count of an open window."""
        self._counts[end_ms] = count

    def close(self, watermark_ms: int) -> None:
        """End a micro-batch, which closed the windows that ended at or before its watermark.

        Those that the batch before had closed become part of the sum.
        """
        self._fold()
        self._watermark_ms = watermark_ms

    def as_record(self) -> dict[str, Any]:
        """What a restart needs."""
        return {
            "closed": self._closed,
            "closed_windows": self._closed_windows,
            "open": {str(end): count for end, count in sorted(self._counts.items())},
        }

    def restore(self, record: Mapping[str, Any], in_state: Mapping[int, int], watermark_ms: int) -> None:
        """Go on after a restart.

        Args:
            record: the last :meth:`as_record` that was published; its batch may not have been committed.
            in_state: counts of the tumbling windows that are open in the checkpoint's state, by end.
            watermark_ms: the watermark of the micro-batch that the state is of, epoch milliseconds.
        """
        self._closed = int(record["closed"])
        self._closed_windows = int(record.get("closed_windows", 0))  # the earliest records do not say it
        self._counts = {int(end): int(count) for end, count in record["open"].items()}
        self._watermark_ms = watermark_ms
        self._fold()
        self._counts = dict(in_state)

    def _fold(self) -> None:
        """Sum up the windows that are closed."""
        for end_ms in [end for end in self._counts if end <= self._watermark_ms]:
            self._closed += self._counts.pop(end_ms)
            self._closed_windows += 1
