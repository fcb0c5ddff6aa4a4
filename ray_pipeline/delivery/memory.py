"""Delivery into memory, for tests: keeps the promises of the real ones, and can be made to fail."""

from __future__ import annotations

from collections import defaultdict

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import DeliveryError, FencedError
from ray_pipeline.events import EventBatch

__all__ = ["MemoryDelivery", "MemoryLog"]

_HALVES = {
    "commit, ratings alone": ("ratings", False),
    "commit, progress alone": ("progress", False),
    "commit, ratings first": ("ratings", True),
    "commit, progress first": ("progress", True),
    "commit, nothing first": ("nothing", True),
}


class MemoryLog:
    """What a broker would hold.

    Attributes:
        ratings: committed records by partition, (key, value).
        progress: the committed progress record of each partition.
        failures: names of operations that fail next, in order: ``open``, ``send``, ``commit`` (nothing is visible),
            ``commit, done`` (it is visible, but the sender does not hear of it); and as a single broker may leave it that is
            killed in a commit: ``commit, ratings alone`` or ``commit, progress alone`` (the rest is lost, the sender does not
            hear), ``commit, ratings first``, ``commit, progress first`` or ``commit, nothing first`` (the sender hears that all
            is well; the rest is visible with its next commit, or lost when the shard is opened again).
        halves: partitions whose last commit was not kept as a whole.
        held_up: partitions in which somebody else has a transaction open.
    """

    def __init__(self) -> None:
        self.ratings: dict[int, list[tuple[bytes, bytes | None]]] = defaultdict(list)
        self.progress: dict[int, ShardProgress] = {}
        self.failures: list[str] = []
        self.owner: dict[int, MemoryDelivery] = {}
        self.halves: set[int] = set()
        self.held_up: set[int] = set()

    def fails(self, operation: str) -> bool:
        """Whether this operation fails now."""
        if self.failures and self.failures[0] == operation:
            del self.failures[0]
            return True
        return False


class MemoryDelivery:
    """See :class:`ShardDelivery`.

    Args:
        log: where ratings go.
        partition: the shard.
    """

    def __init__(self, log: MemoryLog, partition: int) -> None:
        self._log = log
        self._partition = partition
        self._pending: list[tuple[bytes, bytes | None]] = []
        self._unmarked: list[tuple[bytes, bytes | None]] = []

    def open(self, deadline_s: float) -> ShardProgress | None:
        """Fence predecessors and read the last committed progress."""
        if self._log.fails("open"):
            raise DeliveryError(problem=f"no answer within {deadline_s:.0f} s")
        self._log.owner[self._partition] = self
        return self._log.progress.get(self._partition)

    def newest(self, count: int, deadline_s: float) -> list[bytes | None]:
        """Values of the last records, the last one first."""
        if self._partition in self._log.held_up:
            raise DeliveryError(problem=f"a transaction has been open for {deadline_s:.0f} s")
        return [value for _, value in reversed(self._log.ratings[self._partition][-count:])]

    def oldest(self, count: int, deadline_s: float) -> list[bytes | None]:
        """Values of the first records."""
        return [value for _, value in self._log.ratings[self._partition][:count]]

    def send(self, batch: EventBatch) -> None:
        """Queue ratings."""
        self._check()
        if self._log.fails("send"):
            raise DeliveryError(problem="the queue stayed full")
        self._pending += zip(encode_keys(batch), encode_values(batch), strict=True)

    def commit(self, progress: ShardProgress) -> None:
        """Make ratings and progress visible together."""
        self._check()
        if self._log.fails("commit"):
            self._pending.clear()
            raise DeliveryError(problem="the commit failed")
        half, heard = self._half_kept()
        if half in ("", "ratings"):
            self._log.ratings[self._partition] += self._unmarked + self._pending
            self._unmarked.clear()
        elif heard:
            self._unmarked += self._pending
        if half in ("", "progress"):
            self._log.progress[self._partition] = progress
        self._pending.clear()
        if not heard or self._log.fails("commit, done"):
            raise DeliveryError(problem="no answer to the commit")

    def confirm(self, progress: ShardProgress, deadline_s: float) -> None:
        """Look whether the record is there."""
        if self._log.progress.get(self._partition) != progress:
            raise DeliveryError(problem=f"not seen within {deadline_s:.0f} s")

    def close(self) -> None:
        """Drop what was not committed, or not in every partition."""
        self._pending.clear()
        self._unmarked.clear()

    def _half_kept(self) -> tuple[str, bool]:
        """What of a commit is kept alone, if not all of it; and whether its sender hears that all is well."""
        name = next((name for name in _HALVES if self._log.fails(name)), None)
        half, heard = _HALVES[name] if name else ("", True)
        (self._log.halves.add if half else self._log.halves.discard)(self._partition)
        return half, heard

    def _check(self) -> None:
        if self._log.owner.get(self._partition) is not self:
            raise FencedError(problem=f"shard {self._partition}: a successor took over")
