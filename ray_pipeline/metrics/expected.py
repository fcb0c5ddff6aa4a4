"""What the Spark job must have read of a partition, from the shard's own plan: exact while ratings flow, not only at rest.

A shard's rating n has an event time that follows from its rate plan. So when the job says that it has read N records of a
partition, the newest of time T, then rating N - 1 must be due at T to the millisecond. Where records are broken on purpose, T is
the newest time that the first N records name, of those that the job takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import Epoch
from ray_pipeline.generator.arrivals import poisson_arrivals
from ray_pipeline.generator.plan import RatePlan, ShardSchedule
from ray_pipeline.model.faults import Faults, make_faults
from ray_pipeline.truth.validity import ValidRecords

__all__ = ["ReadCheck", "check_of", "due_times", "surplus"]

_BLOCK = 1 << 16


def surplus(progress: Mapping[str, Any], records: int, newest_ms: int) -> int | None:
    """How many records too many (or, below 0, too few) the job has read of a partition.

    Args:
        progress: the shard's progress record.
        records: what the job has read.
        newest_ms: the newest event time among them, epoch milliseconds.

    Returns:
        None while it cannot be told: the job is ahead of the progress record at hand.
    """
    last_ms = progress["event_time_ms"]
    if last_ms is None or newest_ms > int(last_ms):
        return None
    schedule = _schedule(progress)
    if records > 0 and int(schedule.due_ms(records - 1, 1)[0]) == newest_ms:
        return 0
    return records - int(schedule.count_before(np.array([newest_ms + 1], np.int64), int(progress["next_index"]))[0])


def check_of(settings: Mapping[str, Any], guard_ms: int, partition: int) -> ReadCheck | None:
    """What stands in for :func:`surplus` where records of a shard are broken on purpose; None where none are.

    Args:
        settings: the event settings that the run published.
        guard_ms: the guard that the job published, milliseconds.
        partition: the shard.
    """
    faults = make_faults(Settings.model_construct(**settings), partition)
    return None if faults is None else ReadCheck(faults, guard_ms)


class ReadCheck:
    """Compares what the job has read of a shard whose records are broken on purpose.

    The newest time among the first n records is remembered by blocks.

    Args:
        faults: the shard's.
        guard_ms: how far ahead of its sending an event time may lie, milliseconds; 0 = as far as it likes.
    """

    def __init__(self, faults: Faults, guard_ms: int) -> None:
        self._faults = faults
        self._rejects = ValidRecords(faults, guard_ms).rejects
        self._newest = [-1]  # before each block

    def surplus(self, progress: Mapping[str, Any], records: int, newest_ms: int) -> int | None:
        """See :func:`surplus`."""
        sent, schedule = int(progress["next_index"]), _schedule(progress)
        if records > sent and newest_ms > self._at(schedule, sent):
            return None
        if self._at(schedule, min(records, sent)) == newest_ms:
            return max(0, records - sent)
        low, high = 0, sent  # the most records with no newer time than that
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._at(schedule, middle) <= newest_ms else (low, middle - 1)
        return records - low

    def _at(self, schedule: ShardSchedule, records: int) -> int:
        """The newest time that the first records name, of those that the job takes; -1 without any."""
        block = records // _BLOCK
        while len(self._newest) <= block:
            known = len(self._newest) - 1
            self._newest.append(max(self._newest[-1], self._newest_of(schedule, known * _BLOCK, _BLOCK)))
        return max(self._newest[block], self._newest_of(schedule, block * _BLOCK, records - block * _BLOCK))

    def _newest_of(self, schedule: ShardSchedule, first: int, count: int) -> int:
        fates = self._faults.fates(first, count, schedule.due_ms)
        return int(fates.times_ms[~self._rejects[fates.faults]].max(initial=-1))


def due_times(progress: Mapping[str, Any], indexes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """When ratings of a shard were due, epoch milliseconds, shape as ``indexes``: of ratings before its ``next_index``."""
    schedule = _schedule(progress)
    return schedule.plan.time_of(schedule.arrivals.points_at(indexes) / schedule.share)


def _schedule(progress: Mapping[str, Any]) -> ShardSchedule:
    plan = RatePlan(Epoch.from_record(epoch) for epoch in progress["epochs"])
    poisson = poisson_arrivals(progress.get("poisson_seed"), int(progress.get("partition", 0)))
    return ShardSchedule(plan, float(progress["share"]), float(progress["phase"]), poisson)
