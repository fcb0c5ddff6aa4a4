"""Which ratings a task makes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ShardRange", "cut"]


@dataclass(frozen=True, slots=True)
class ShardRange:
    """Consecutive ratings of one shard.

    Attributes:
        partition: the shard.
        first: index of the first rating.
        stop: index after the last one.
    """

    partition: int
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first


def cut(shards: Sequence[ShardRange], tasks: int) -> list[list[ShardRange]]:
    """Share ratings out to tasks, as evenly as whole numbers allow.

    Args:
        shards: what there is to make.
        tasks: how many tasks, ≥ 1.

    Returns:
        What each task makes, in the order of ``shards``; a task may have nothing.
    """
    total = sum(map(len, shards))
    bounds = [total * task // tasks for task in range(tasks + 1)]
    found: list[list[ShardRange]] = [[] for _ in range(tasks)]
    before = 0
    for shard in shards:
        for task in range(tasks):
            lo, hi = max(bounds[task] - before, 0), min(bounds[task + 1] - before, len(shard))
            if lo < hi:
                found[task].append(ShardRange(shard.partition, shard.first + lo, shard.first + hi))
        before += len(shard)
    return found
