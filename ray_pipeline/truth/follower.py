"""Which rating each record of a partition is, in the order of the records: also of those that are broken on purpose."""

from __future__ import annotations

from ray_pipeline.codec import encode_values
from ray_pipeline.truth.replay import ShardReplay

__all__ = ["Follower"]

_BLOCK = 4096


class Follower:
    """Goes along with a partition's records. A text that says nothing of itself is known by its place behind one that does.

    What is no rating of the shard is passed over; where ratings are missing, the next one that says which it is shows by how many.

    Args:
        replay: the shard.
        index: which rating comes next; None = not known yet.
    """

    def __init__(self, replay: ShardReplay, index: int | None) -> None:
        self.index = index
        self._replay = replay
        self._first = 0
        self._values: list[bytes | None] = []

    def index_of(self, value: bytes | None) -> int | None:
        """Which rating the next record is; None when it is none, or not to be told."""
        found = self.index if self.index is not None and value == self._expected(self.index) else None
        if found is None:
            found = self._replay.index_of(value)  # where it stands first: what was there before is there once more
            if found is None or (self.index is not None and found < self.index):
                return found
        self.index = found + 1
        return found

    def forget(self) -> None:
        """Ratings are to be made anew: their times may have changed."""
        self._values = []

    def _expected(self, index: int) -> bytes | None:
        if not self._first <= index < self._first + len(self._values):
            self._first, self._values = index, encode_values(self._replay.events(index, _BLOCK))
        return self._values[index - self._first]
