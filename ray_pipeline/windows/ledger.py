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
        # replaced as a whole: another thread may publish what it finds here at any moment
        self._standing: tuple[int, int, dict[int, int]] = (0, 0, {})  # ratings and windows closed before, counts by end
        self._watermark_ms = 0

    @property
    def counted(self) -> int:
        """Ratings counted in tumbling windows since the first record of the topic."""
        closed, _, counts = self._standing
        return closed + sum(counts.copy().values())

    def set(self, end_ms: int, count: int) -> None:
        """Note the count of an open window."""
        self._standing[2][end_ms] = count

    def close(self, watermark_ms: int) -> None:
        """End a micro-batch, which closed the windows that ended at or before its watermark.

        Those that the batch before had closed become part of the sum.
        """
        self._standing = _closed(*self._standing, self._watermark_ms)
        self._watermark_ms = watermark_ms

    def as_record(self) -> dict[str, Any]:
        """What a restart needs."""
        closed, windows, counts = self._standing
        return {
            "closed": closed,
            "closed_windows": windows,
            "open": {str(end): count for end, count in sorted(counts.copy().items())},
        }

    def restore(self, record: Mapping[str, Any], in_state: Mapping[int, int], watermark_ms: int) -> None:
        """Go on after a restart.

        Args:
            record: the last :meth:`as_record` that was published; its batch may not have been committed.
            in_state: counts of the tumbling windows that are open in the checkpoint's state, by end.
            watermark_ms: the watermark of the micro-batch that the state is of, epoch milliseconds.
        """
        told = {int(end): int(count) for end, count in record["open"].items()}
        closed, windows, _ = _closed(int(record["closed"]), int(record["closed_windows"]), told, watermark_ms)
        self._standing, self._watermark_ms = (closed, windows, dict(in_state)), watermark_ms


def _closed(ratings: int, windows: int, counts: dict[int, int], watermark_ms: int) -> tuple[int, int, dict[int, int]]:
    """The sums with the windows that ended at or before a watermark, and the counts without them."""
    over = [count for end, count in counts.items() if end <= watermark_ms]
    return (
        ratings + sum(over),
        windows + len(over),
        {end: count for end, count in counts.items() if end > watermark_ms},
    )
