"""History into the ratings topic: a Spark job sends the shards' next ratings in place of the actors, by the actors' own rules.

A task is the runner of one shard, with a clock for which everything is due. It opens the shard's delivery, which shuts out whoever
had it, goes on behind what is committed, and commits progress with its ratings: so a task that is run again, or runs twice, neither
loses nor repeats one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from ray_pipeline.clock import SystemClock
from ray_pipeline.config import Settings
from ray_pipeline.delivery.factory import open_delivery
from ray_pipeline.errors import DeliveryError, FencedError, ProcessingError, StateMismatchError
from ray_pipeline.generator.event_clock import EventClock
from ray_pipeline.generator.plan import ShardSchedule
from ray_pipeline.generator.runner import Assignment, RunnerState, ShardRunner
from ray_pipeline.history.loan import LentShard
from ray_pipeline.history.making import ModelSource
from ray_pipeline.restart import RestartPolicy

__all__ = ["send", "send_shard"]

_COMMIT_INTERVAL_MS = 500  # nobody waits for single ratings of history
_AHEAD_MS = 32 * 86_400_000  # so far behind history, in event time, a task's clock is: all of it is due


def send(spark: Any, settings: Settings, bootstrap: str, source: ModelSource, shards: list[LentShard]) -> None:
    """Send the ratings of all shards up to their ends; one task a shard. Blocks.

    Raises:
        StateMismatchError: the catalogue at hand is not the generator's.
        ProcessingError: a task failed for good; what it committed stays, and the actors go on behind it.
    """
    from py4j.protocol import Py4JJavaError

    if source.settings.digest(source.catalogue.digest) != shards[0].progress.config:
        raise StateMismatchError(
            problem="the Spark job has another catalogue than the generator", fix="Give process the same --catalog"
        )

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column("id").to_pylist():
                reached = send_shard(settings, source, shards[number], lambda p: open_delivery(settings, bootstrap, p))
                yield pa.RecordBatch.from_pydict({"reached": pa.array([reached], pa.int64())})

    try:
        spark.range(0, len(shards), 1, len(shards)).mapInArrow(task, "reached bigint").collect()
    except Py4JJavaError as error:
        lines = [line.strip() for line in str(error.java_exception.toString()).splitlines()]
        said = next((line for line in reversed(lines) if "Error: " in line), lines[0])
        raise ProcessingError(
            problem=f"a task of the backfill failed: {said[:400]}",
            fix="Nothing is lost or repeated: the actors send what it left",
        ) from error


def send_shard(settings: Settings, source: ModelSource, shard: LentShard, open_shard: Callable[[int], Any]) -> int:
    """Send the ratings of one shard up to its end. Blocks.

    Returns:
        The index after the last one that is committed.

    Raises:
        FencedError: somebody else took the shard over.
        DeliveryError: the broker does not take them.
    """
    progress, partition, clock = shard.progress, shard.progress.partition, SystemClock()
    runner = ShardRunner(
        partition,
        lambda: source.model(partition),
        lambda: open_shard(partition),
        max(settings.commit_interval_ms, _COMMIT_INTERVAL_MS),
        clock,
        RestartPolicy(),
    )
    place = (progress.run, progress.config, progress.epochs, progress.share, progress.phase)
    last_ms = int(ShardSchedule.lived(progress).due_ms(max(0, shard.end - 1), 1)[0])
    all_is_due = EventClock(last_ms + _AHEAD_MS, clock.now_ms())
    runner.tell(Assignment(1, *place, shard.end, all_is_due, progress.poisson_seed))
    idle = threading.Event()
    while (wait_s := runner.step()) is not None:
        report = runner.report()
        if report.state is RunnerState.FENCED:
            runner.stop()
            runner.step()
            raise FencedError(problem=f"shard {partition}: it was taken over at rating {report.next_index}")
        if report.state is RunnerState.DONE:
            runner.stop()
        else:
            clock.wait(idle, wait_s)
    report = runner.report()
    if report.state is not RunnerState.DONE:
        raise DeliveryError(problem=f"shard {partition}: {report.error}")
    return report.next_index
