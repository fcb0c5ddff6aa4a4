"""What the Spark job must have read of a partition, from the shard's own plan: exact while ratings flow, not only at rest.

A shard's rating n has an event time that follows from its rate plan. So when the job says that it has read N records of a
partition, the newest of time T, then rating N - 1 must be due at T to the millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ray_pipeline.delivery.interface import Epoch
from ray_pipeline.generator.plan import RatePlan, ShardSchedule

__all__ = ["surplus"]


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
    plan = RatePlan(Epoch(int(e["from_ms"]), float(e["rate"])) for e in progress["epochs"])
    schedule = ShardSchedule(plan, float(progress["share"]), float(progress["phase"]))
    if records > 0 and int(schedule.due_ms(records - 1, 1)[0]) == newest_ms:
        return 0
    return records - int(schedule.count_before(np.array([newest_ms + 1], np.int64), int(progress["next_index"]))[0])
