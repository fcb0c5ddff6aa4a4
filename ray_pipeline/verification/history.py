"""Which ratings history is to have: the first of the run that is in the topics, with the times that they have, or will have."""

from __future__ import annotations

from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.generator.plan import NEVER_MS, ShardSchedule, allocate
from ray_pipeline.history.making import ModelSource
from ray_pipeline.history.parquet import ParquetOrder
from ray_pipeline.history.ranges import ShardRange
from ray_pipeline.kafka.read import read_compacted
from ray_pipeline.truth.replay import published_catalogue, published_settings

__all__ = ["parquet_order"]


def parquet_order(settings: Settings, bootstrap: str, events: int, uri: str, tasks: int | None) -> ParquetOrder:
    """The first ratings of the run, those that are due first.

    Args:
        settings: all settings; of the events, what the run published counts.
        bootstrap: brokers, HOST:PORT[,…].
        events: how many ratings over all shards.
        uri: where to.
        tasks: of how many tasks; None = as suits.

    Raises:
        ConfigurationError: nothing was sent yet, or the plan does not reach so many ratings.
        StateMismatchError: the run's catalogue is not at hand.
    """
    records = read_compacted(bootstrap, settings.progress_topic)
    run = records.get("run")
    progress = [ShardProgress.from_record(r) for key, r in records.items() if key.startswith("shard/")]
    lived = {p.partition: p for p in progress}
    if run is None or len(lived) < int(run["settings"]["partitions"]):
        raise ConfigurationError(
            problem=f"topic {settings.progress_topic} has no progress of every shard yet: nothing tells the rate plan",
            fix="Let the pipeline send for a moment first",
        )
    catalogue = published_catalogue(settings, run)
    own = published_settings(settings, run, catalogue)
    shards = [lived[p] for p in sorted(lived)]
    schedules = [ShardSchedule.lived(p) for p in shards]
    ends = allocate(schedules, [0] * len(schedules), events)
    for schedule, end in zip(schedules, ends, strict=True):
        if end and int(schedule.due_ms(end - 1, 1)[0]) == NEVER_MS:
            raise ConfigurationError(
                problem=f"the rate plan does not reach {events} ratings: it ends paused",
                fix=f"Give --events {sum(p.next_index for p in shards)} or fewer, or resume the stream",
            )
    ranges = tuple(ShardRange(p.partition, 0, end) for p, end in zip(shards, ends, strict=True))
    return ParquetOrder(uri, ModelSource(own, catalogue), lived, ranges, tasks)
