"""How many ratings the tumbling windows have counted, closed windows included, across restarts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CountLedger"]


class CountLedger:
    """Sums the counts of tumbling windows.

    The state forgets a window when it closes, and the process may end at any moment; so each record of the job has the counts of
    the windows that were open, and a restart can tell which of them have closed since.
    """

    def __init__(self) -> None:
        self._closed = 0
        self._closed_windows = 0
        self._closed_through_ms = 0
        self._open: dict[int, int] = {}

    @property
    def counted(self) -> int:
        """Ratings counted in tumbling windows since the first record of the topic."""
        return self._closed + sum(self._open.values())

    @property
    def closed_through_ms(self) -> int:
        """End of the last window that was closed, epoch milliseconds."""
        return self._closed_through_ms

    def set(self, end_ms: int, count: int) -> None:
        """Note the count of an open window."""
        self._open[end_ms] = count

    def close(self, watermark_ms: int) -> None:
        """Close the windows that ended at or before the watermark."""
        for end_ms in [end for end in self._open if end <= watermark_ms]:
            self._closed += self._open.pop(end_ms)
            self._closed_windows += 1
            self._closed_through_ms = max(self._closed_through_ms, end_ms)

    def as_record(self) -> dict[str, Any]:
        """What a restart needs."""
        return {
            "closed": self._closed,
            "closed_windows": self._closed_windows,
            "closed_through_ms": self._closed_through_ms,
            "open": {str(end): count for end, count in sorted(self._open.items())},
        }

    def restore(self, record: Mapping[str, Any], in_state: Mapping[int, int]) -> None:
        """Go on after a restart.

        Args:
            record: the last :meth:`as_record` that was published; its batch may not have been committed.
            in_state: counts of the tumbling windows that the checkpoint's state holds, by end.
        """
        self._closed_through_ms = int(record["closed_through_ms"])
        self._closed = int(record["closed"])
        self._closed_windows = int(record.get("closed_windows", 0))  # earlier records do not say it
        self._open = {}
        for end, count in record["open"].items():
            if int(end) not in in_state:  # left the state before the record's successor could say so
                self._closed += int(count)
                self._closed_windows += 1
                self._closed_through_ms = max(self._closed_through_ms, int(end))
        for end_ms, count in in_state.items():
            if end_ms > self._closed_through_ms:
                self._open[end_ms] = count
