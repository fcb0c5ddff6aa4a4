"""Spark settings for a low-latency streaming query on few cores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spark_compat.paths import hadoop_uri
from spark_compat.usage import MEMORY_CONF

__all__ = ["JAVA_OPTIONS", "spark_conf"]

_CHECKPOINTING = "org.apache.spark.sql.execution.streaming.checkpointing"
_QUICK_START = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
# the second compiler only for what is really hot: else it takes the CPUs from the first batches
_EXECUTOR = (
    "-XX:+UseSerialGC "
    "-XX:Tier4InvocationThreshold=20000 -XX:Tier4CompileThreshold=60000 -XX:Tier4BackEdgeThreshold=160000"
)
JAVA_OPTIONS = {
    # driver and master plan and coordinate: the second compiler costs them more than it gives back
    "spark.driver.extraJavaOptions": _QUICK_START,
    "spark.ray.raydp_app_master.extraJavaOptions": _QUICK_START,
    "spark.executor.extraJavaOptions": _EXECUTOR,
}
"""Options of the JVMs, by setting: the driver's, RayDP's masters', the executors'."""


def spark_conf(*, jars: Sequence[Path], fair_scheduler_file: Path, shuffle_partitions: int) -> dict[str, str]:
    """Spark settings.

    Args:
        jars: archives beside Spark's own; must be at the same path on every node.
        fair_scheduler_file: pools of the FAIR scheduler; read by the driver.
        shuffle_partitions: partitions of a shuffle, and so of the state: fixed for the life of a checkpoint.
    """
    return {
        "spark.jars": ",".join(str(jar) for jar in jars),
        # where executors find the packages of a Python function, also when they were not installed but sent along with a Ray job
        "spark.executorEnv.PYTHONPATH": str(Path(__file__).parents[1]),
        "spark.scheduler.mode": "FAIR",
        "spark.scheduler.allocation.file": hadoop_uri(fair_scheduler_file),
        "spark.sql.shuffle.partitions": str(shuffle_partitions),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.streaming.pollingDelay": "10ms",
        # a batch without data would only move the watermark; the next one with data does that as well
        "spark.sql.streaming.noDataMicroBatches.enabled": "false",
        "spark.sql.streaming.stateStore.providerClass": (
            "org.apache.spark.sql.execution.streaming.state.RocksDBStateStoreProvider"
        ),
        "spark.sql.streaming.stateStore.rocksdb.changelogCheckpointing.enabled": "true",
        # counting groups would cost a lookup for every write
        "spark.sql.streaming.stateStore.rocksdb.trackTotalNumberOfRows": "false",
        "spark.sql.streaming.minBatchesToRetain": "20",
        # where Hadoop has no native library, it starts a process for every right that it sets on a file and every link that it looks
        # for: some 20 a micro-batch. Plain files, written under another name and renamed, need one each
        "spark.hadoop.fs.file.impl": "org.apache.hadoop.fs.RawLocalFileSystem",
        "spark.sql.streaming.checkpointFileManagerClass": f"{_CHECKPOINTING}.FileSystemBasedCheckpointFileManager",
        # adaptive plans cost planning time in every micro-batch and can change nothing in one so small
        "spark.sql.adaptive.enabled": "false",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
        **JAVA_OPTIONS,
        **MEMORY_CONF,
        # RayDP's master takes no CPU: it only hands out executors
        "spark.ray.raydp_spark_master.actor.resource.CPU": "0",
    }
