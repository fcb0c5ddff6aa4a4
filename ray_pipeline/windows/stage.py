"""The windowing stage: a Spark session, one streaming query, and what watches it. Plain class; an actor where it is started."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from confluent_kafka import TopicPartition

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.config import Settings
from ray_pipeline.errors import EnvironmentProblem, ProcessingError, StateMismatchError
from ray_pipeline.kafka.client import make_consumer
from ray_pipeline.kafka.read import newest_of_key
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.windows.collector import Collector
from ray_pipeline.windows.job import aggregate, parse, rejected
from ray_pipeline.windows.sink import BatchSink, to_groups
from ray_pipeline.windows.spec import window_specs
from spark_compat.conf import spark_conf
from spark_compat.errors import SparkCompatError
from spark_compat.hadoop import exists, read_text, write_text
from spark_compat.jars import spark_connector_jars
from spark_compat.progress import BatchProgress, read_progress
from spark_compat.session import SparkSessionOwner

__all__ = ["POOL", "WindowStage"]

_log = logging.getLogger(__name__)

POOL = "streaming"
QUERY = "windows"
_HEARTBEAT_S = 1.0
_MARKER = "ray-pipeline.json"
_FAIR_SCHEDULER = Path(__file__).with_name("fairscheduler.xml")


class WindowStage:
    """Windows the ratings topic into the metrics topic.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        console: print each changed window to stdout.
        master: such as ``local[2]``: plain Spark without Ray; None = on the Ray cluster of this process.
        clock: tells the time.
    """

    def __init__(
        self,
        settings: Settings,
        bootstrap: str,
        *,
        console: bool = False,
        master: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._console = console
        self._clock = clock or SystemClock()
        self._specs = window_specs(settings)
        self._shuffle_partitions = max(2, settings.executors * settings.executor_cores)
        self._app_name = f"ray-pipeline-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._master = master
        self._owner: SparkSessionOwner | None = None
        self._query: Any = None
        self._sink: BatchSink | None = None
        self._state = "starting"
        self._reason = ""
        self._executors = 0
        self._restored: BatchProgress = BatchProgress()
        self._publishing = threading.Lock()
        self._end = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="job-heartbeat", daemon=True)

    # -- life

    def start(self) -> None:
        """Bring Spark up and start the query; goes on from the checkpoint when there is one. Blocks for 15 s or so.

        Raises:
            EnvironmentProblem: Java, jars or CPUs are missing.
            StateMismatchError: the checkpoint is of other window settings.
            ProcessingError: the query did not start.
        """
        spark = self.start_session()
        checkpoint = self._settings.checkpoint_uri
        self._check_marker(spark, checkpoint)
        self._sink = BatchSink(
            self._settings,
            self._bootstrap,
            Collector(load_catalogue(self._settings), self._specs, self._settings.top_n),
            self._specs,
            self._clock,
            lambda: self._progress().watermark_ms or 0,
            self._read_rejects,
            self._job_record,
            self._print if self._console else None,
        )
        self._restore(spark, checkpoint)
        raw = (
            spark.readStream.format("kafka")
            .option("kafka.bootstrap.servers", self._bootstrap)
            .option("subscribe", self._settings.ratings_topic)
            .option("startingOffsets", "earliest")
            .option("failOnDataLoss", "true")
            .option("maxOffsetsPerTrigger", str(self._settings.max_offsets_per_trigger))
            .option("kafka.isolation.level", "read_committed")
            .option("kafka.fetch.max.wait.ms", "10")
            .load()
        )
        groups = aggregate(parse(raw), self._specs, round(self._settings.watermark_s * 1000))
        writer = (
            groups.writeStream.queryName(QUERY)
            .outputMode("update")
            .option("checkpointLocation", checkpoint)
            .foreachBatch(self._sink)
        )
        if self._settings.trigger_interval_ms:
            writer = writer.trigger(processingTime=f"{self._settings.trigger_interval_ms} milliseconds")
        # the pool is a property of the thread that starts the query
        spark.sparkContext.setLocalProperty("spark.scheduler.pool", POOL)
        self._query = writer.start()
        spark.sparkContext.setLocalProperty("spark.scheduler.pool", None)
        self._state = "running"
        self._heart.start()

    def start_session(self) -> Any:
        """Bring up Spark alone, for batch jobs without the query."""
        settings = self._settings
        try:
            conf = spark_conf(
                jars=spark_connector_jars(),
                fair_scheduler_file=settings.fair_scheduler_file or _FAIR_SCHEDULER,
                shuffle_partitions=self._shuffle_partitions,
            )
            self._owner = SparkSessionOwner(
                self._app_name, conf, settings.executors, settings.executor_cores, settings.executor_memory, self._master
            )
            return self._owner.start()
        except SparkCompatError as error:
            raise EnvironmentProblem(problem=error.problem, fix=error.fix) from error

    def stop(self, *, drain: bool, deadline_s: float) -> bool:
        """End the query and Spark.

        Args:
            drain: first work off all that is in the ratings topic now.
            deadline_s: longest time for it, seconds.

        Returns:
            Whether all was worked off (always True without ``drain``).
        """
        drained = self._drain(deadline_s) if drain and self._query is not None and self._query.isActive else not drain
        self._end.set()
        if self._heart.is_alive():
            self._heart.join(10)
        if self._query is not None and self._query.isActive:
            self._query.stop()
        if self._sink is not None:
            if self._state != "failed":
                self._state = "stopped"
            with self._publishing:
                self._sink.publish_job()
            self._sink.close()
        if self._owner is not None:
            self._owner.stop()
        return drained

    def status(self) -> dict[str, Any]:
        """State, reason, and the record of topic ``metrics.progress``; returns at once."""
        return {
            **(self._sink.totals() if self._sink is not None else {}),
            **self._job_record(),
        }

    def run_batch(self) -> dict[str, Any]:
        """The batch report over everything in the ratings topic, in pool ``batch`` of this Spark application."""
        from ray_pipeline.windows.batch import report

        if self._owner is None:
            msg = "Spark is not up yet"
            raise ProcessingError(msg, "Try again in a moment")
        return report(self._owner.session, self._settings, self._bootstrap)

    # -- inside

    def _progress(self) -> BatchProgress:
        return read_progress(self._query) if self._query is not None else BatchProgress()

    def _job_record(self) -> dict[str, Any]:
        last = self._progress()
        return {
            "state": self._state,
            "reason": self._reason,
            "watermark_ms": last.watermark_ms,
            "input_rows": last.input_rows,
            "input_rate": last.input_rate,
            "processed_rate": last.processed_rate,
            "batch_duration_ms": last.duration_ms,
            "durations_ms": last.durations_ms,
            "state_rows": last.state_rows,
            "state_bytes": last.state_bytes,
            "dropped_groups": last.dropped_groups,
            "lag": last.lag,
            "executors": self._executors,
            "executors_wanted": self._settings.executors if self._master is None else 0,
            "application": self._app_name,
            "query": QUERY,
            "pool": POOL,
            "pools": ["streaming", "batch", "generator"],
            "window_types": [spec.name for spec in self._specs],
        }

    def _beat(self) -> None:
        while not self._end.wait(_HEARTBEAT_S):
            try:
                if self._owner is not None:
                    self._executors = self._owner.executors_alive()
                if self._state == "running" and not self._query.isActive:
                    self._state, self._reason = "failed", _why(self._query.exception(), self._settings)
                    _log.error("the streaming query ended: %s", self._reason)
                if self._sink is not None:
                    with self._publishing:
                        self._sink.publish_job()
            except Exception as error:  # noqa: BLE001 - a heartbeat that fails is late, and lateness is what is shown
                _log.warning("heartbeat of the windowing job: %s", error)

    def _drain(self, deadline_s: float) -> bool:
        deadline = time.monotonic() + deadline_s
        consumer = make_consumer(self._bootstrap)
        try:
            partitions = range(self._settings.partitions)
            ends = {
                p: consumer.get_watermark_offsets(TopicPartition(self._settings.ratings_topic, p), timeout=15)[1]
                for p in partitions
            }
        finally:
            consumer.close()
        while self._query.isActive and time.monotonic() < deadline:
            done = self._progress().end_offsets
            if all(done.get(p, 0) >= end for p, end in ends.items()):
                return True
            time.sleep(0.05)
        return False

    def _check_marker(self, spark: Any, checkpoint: str) -> None:
        """Refuse a checkpoint whose state means something else than these settings do."""
        wanted = {
            "ratings_topic": self._settings.ratings_topic,
            "tumbling_s": self._settings.tumbling_s,
            "sliding_s": self._settings.sliding_s,
            "slide_s": self._settings.slide_s,
            "watermark_s": self._settings.watermark_s,
            "partitions": self._settings.partitions,
            "shuffle_partitions": self._shuffle_partitions,
        }
        uri = f"{checkpoint.rstrip('/')}/{_MARKER}"
        text = read_text(spark, uri)
        if text is None:
            write_text(spark, uri, json.dumps(wanted))
            return
        there = json.loads(text)
        for name, value in wanted.items():
            if there.get(name) != value:
                raise StateMismatchError(
                    problem=f"the checkpoint {checkpoint} is of another configuration: "
                    f"{name} was {there.get(name)}, is {value}",
                    fix="Give the former value, another --checkpoint, or clear it with: ray-pipeline reset",
                )

    def _restore(self, spark: Any, checkpoint: str) -> None:
        assert self._sink is not None
        if not exists(spark, f"{checkpoint.rstrip('/')}/commits/0") and not exists(
            spark, f"{checkpoint.rstrip('/')}/state/0"
        ):
            return
        from pyspark.sql import functions as F  # noqa: N812

        names = [*(f"a{i}" for i in range(5)), "max_offset", "max_rejected", "max_event_ms"]
        shape = "struct<" + ",".join(f"{name}:bigint" for name in names) + ">"
        assert spark.streams.active == []  # asking makes the session's state store coordinator, which the reader reports to
        state = spark.read.format("statestore").load(checkpoint)
        rows = state.select(
            F.col("key.kind").alias("kind"),
            F.unix_millis("key.window_end").alias("end_ms"),
            F.col("key.id").alias("id"),
            F.col("value").cast(shape).alias("v"),
        ).select("kind", "end_ms", "id", "v.*")
        last = newest_of_key(self._bootstrap, self._settings.job_topic, "job", 60.0)
        self._sink.restore(to_groups(rows.toArrow()), json.loads(last) if last else None)

    def _read_rejects(self, partition: int, first: int, last: int) -> list[dict[str, Any]]:
        assert self._owner is not None
        topic = self._settings.ratings_topic
        raw = (
            self._owner.session.read.format("kafka")
            .option("kafka.bootstrap.servers", self._bootstrap)
            .option("assign", json.dumps({topic: [partition]}))
            .option("startingOffsets", json.dumps({topic: {str(partition): first}}))
            .option("endingOffsets", json.dumps({topic: {str(partition): last + 1}}))
            .option("kafka.isolation.level", "read_committed")
            .option("failOnDataLoss", "false")  # the first offset may be a marker's, or cleaned away already
            .load()
        )
        rows: list[dict[str, Any]] = rejected(raw).toArrow().to_pylist()
        return rows

    def _print(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _why(exception: Any, settings: Settings) -> str:
    """The useful line of what ended the query."""
    text = str(exception) if exception is not None else "it was stopped from outside"
    if "KAFKA_DATA_LOSS" in text or "failOnDataLoss" in text or "Some data may have been lost" in text:
        return (
            f"records of topic {settings.ratings_topic} that the checkpoint has not read yet are gone (topic deleted, "
            "emptied or aged out). Clear checkpoint and topics with: ray-pipeline reset, or give another --checkpoint"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "Error" in line or "Exception" in line), lines[0])[:500]

