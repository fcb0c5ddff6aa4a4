"""The windowing stage: a Spark session, one streaming query, and what watches it. Plain class; an actor where it is started."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaException

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.config import Settings
from ray_pipeline.errors import (
    CheckpointError,
    ConfigurationError,
    EnvironmentProblem,
    ProcessingError,
    StateMismatchError,
)
from ray_pipeline.history.jobs import SparkJob
from ray_pipeline.history.loan import Loan
from ray_pipeline.history.making import ModelSource
from ray_pipeline.history.parquet import ParquetOrder
from ray_pipeline.history.parquet import write as write_parquet
from ray_pipeline.history.sending import send
from ray_pipeline.kafka.client import RIGHTS
from ray_pipeline.kafka.read import Backlog, newest_of_key
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.restart import Decision, RestartPolicy
from ray_pipeline.windows.archiving import ArchiveQuery
from ray_pipeline.windows.checkpoint import BrokenFile, find_broken, state_problem
from ray_pipeline.windows.collector import Collector
from ray_pipeline.windows.decoding import in_contract_form, with_values_of
from ray_pipeline.windows.job import aggregate, parse, rejected
from ray_pipeline.windows.marker import MARKER, marker_for, mismatch, shuffle_partitions, way_to_clear
from ray_pipeline.windows.sink import BatchSink, to_groups
from ray_pipeline.windows.source import source_options
from ray_pipeline.windows.spec import window_specs
from ray_pipeline.windows.watchdog import ExecutorWatchdog
from spark_compat.conf import spark_conf
from spark_compat.errors import SparkCompatError
from spark_compat.hadoop import list_names, read_text, replace
from spark_compat.jars import spark_avro_jars, spark_connector_jars
from spark_compat.paths import plain_uri
from spark_compat.progress import BatchProgress, planned_progress, read_progress
from spark_compat.session import SparkSessionOwner
from spark_compat.usage import executor_usage, pool_of_jobs, scheduler_pools

__all__ = ["POOL", "WindowStage"]

_log = logging.getLogger(__name__)

POOL = "streaming"
QUERY = "windows"
_HEARTBEAT_S = 1.0
_NOT_ALLOWED = re.compile("AuthorizationException|authorization failed")  # as Spark's client says it, and as ours does
_FAIR_SCHEDULER = Path(__file__).with_name("fairscheduler.xml")


class WindowStage:
    """Windows the ratings topic into the metrics topic.

    A query that ends with an error is started again from its checkpoint, unless the error says that this cannot help.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        master: such as ``local[2]``: plain Spark without Ray; None = on the Ray cluster of this process.
        temporary: where its JVMs put their temporary files, a folder that all nodes have; None = where Java does by itself.
        clock: tells the time.
    """

    def __init__(
        self,
        settings: Settings,
        bootstrap: str,
        *,
        master: str | None = None,
        temporary: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._clock = clock or SystemClock()
        self._specs = window_specs(settings)
        self._shuffle_partitions = shuffle_partitions(settings)
        self._app_name = f"ray-pipeline-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._master = master
        self._temporary = temporary
        self._owner: SparkSessionOwner | None = None
        self._query: Any = None
        self._sink: BatchSink | None = None
        self._state = "starting"
        self._reason = ""
        self._executors = 0
        self._executors_hold: dict[str, Any] = {}
        self._pool: str | None = None
        self._pools: list[dict[str, Any]] = []
        self._query_restarts = 0
        self._archive: ArchiveQuery | None = None
        self._history: SparkJob | None = None
        self._restored: dict[str, Any] = {}
        self._spark_rebuilds = 0
        self._progress_seen = BatchProgress()
        self._lag = 0
        self._policy = RestartPolicy(most=10)
        self._watchdog = ExecutorWatchdog(settings.executors if master is None else 0)
        self._publishing = threading.Lock()
        self._looking = threading.RLock()  # whoever starts or ends the query
        self._end = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="job-heartbeat", daemon=True)

    # -- life

    def start(self) -> None:
        """Bring Spark up and start the query; goes on from the checkpoint when there is one. Blocks for 15 s or so.

        Raises:
            EnvironmentProblem: Java, jars or CPUs are missing.
            StateMismatchError: the checkpoint is of other window settings.
            CheckpointError: a file of the checkpoint is broken.
            ProcessingError: the query did not start.
        """
        self._check_marker(self.start_session(), self._settings.checkpoint_uri)
        self.start_query()
        if self._settings.archive is not None:
            self._archive = ArchiveQuery(
                *(self._settings, self._bootstrap, self.spark, self._specs, self._final_through_ms, self._clock)
            )
            self._archive.start()
        assert self._sink is not None
        totals = self._sink.totals()
        self._restored = {f"restored_{name}": totals[name] for name in ("batch", "counted", "late_dropped", "rejected")}
        self._restored["restored_records"] = sum(said["records"] for said in totals["partitions"].values())
        self._restored["restored_closed_windows"] = totals["ledger"]["closed_windows"]
        self._heart.start()

    def start_session(self) -> Any:
        """Bring up Spark alone, for batch jobs without the query."""
        settings = self._settings
        try:
            conf = spark_conf(
                jars=[*spark_connector_jars(), *spark_avro_jars()],
                fair_scheduler_file=settings.fair_scheduler_file or _FAIR_SCHEDULER,
                shuffle_partitions=self._shuffle_partitions,
            )
            self._owner = SparkSessionOwner(
                self._app_name,
                conf,
                settings.executors,
                settings.executor_cores,
                settings.executor_memory,
                self._master,
                self._temporary,
            )
            return self._owner.start()
        except SparkCompatError as error:
            raise EnvironmentProblem(problem=error.problem, fix=error.fix) from error

    def start_query(self) -> None:
        """Start the query on the session, from its checkpoint when there is one."""
        assert self._owner is not None
        spark, settings = self._owner.session, self._settings
        checkpoint = settings.checkpoint_uri
        sink = BatchSink(
            settings,
            self._bootstrap,
            Collector(load_catalogue(settings), self._specs, settings.top_n, round(settings.watermark_s * 1000)),
            self._specs,
            self._clock,
            self._read_rejects,
            self._job_record,
        )
        _check_files(spark, checkpoint)
        self._restore(spark, checkpoint, sink)
        self._sink = sink
        sink.publish_windows()
        raw = (
            spark.readStream.format("kafka")
            .options(**source_options(self._bootstrap))
            .option("subscribe", settings.ratings_topic)
            .option("startingOffsets", "earliest")
            .option("failOnDataLoss", "true")
            .option("maxOffsetsPerTrigger", str(settings.max_offsets_per_trigger))
            .option("kafka.fetch.max.wait.ms", "10")
            .load()
            # a task a core: more tasks than cores cost a small batch more than its ratings do
            .coalesce(shuffle_partitions(settings))
        )
        raw = in_contract_form(raw, settings)
        groups = aggregate(parse(raw, settings.guard_ms), self._specs, round(settings.watermark_s * 1000))
        writer = (
            groups.writeStream.queryName(QUERY)
            .outputMode("update")
            .option("checkpointLocation", checkpoint)
            .foreachBatch(sink)
        )
        if settings.trigger_interval_ms:
            writer = writer.trigger(processingTime=f"{settings.trigger_interval_ms} milliseconds")
        # the pool is a property of the thread that starts the query
        spark.sparkContext.setLocalProperty("spark.scheduler.pool", POOL)
        try:
            self._query = writer.start()
        finally:
            spark.sparkContext.setLocalProperty("spark.scheduler.pool", None)
        self._state, self._reason, self._pool = "running", "", None

    def drain(self, deadline_s: float) -> bool:
        """Wait until all that is in the ratings topic now has been worked off, and is in the archive.

        Returns:
            Whether that happened within ``deadline_s`` seconds.
        """
        deadline = time.monotonic() + deadline_s
        for _ in range(2):  # the first may be answered by a look at the topic from before this call
            query = self._query

            def wait(query: Any = query) -> None:
                try:
                    query.processAllAvailable()
                except Exception as error:  # noqa: BLE001 - what ended the query is the heartbeat's business
                    _log.debug("drain: %s", error)

            waiting = threading.Thread(target=wait, daemon=True)
            waiting.start()
            waiting.join(max(0.0, deadline - time.monotonic()))
            if waiting.is_alive() or not query.isActive:
                return False
        return self._archive is None or self._archive.flush(deadline - time.monotonic())

    def stop(self) -> None:
        """End the query and Spark; the state is in the checkpoint."""
        self._end.set()
        if self._heart.is_alive():
            self._heart.join(30)
        if self._archive is not None:
            self._archive.stop()
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

    @property
    def spark(self) -> Any:
        """The Spark session; exists from :meth:`start_session` on."""
        assert self._owner is not None
        return self._owner.session

    def status(self) -> dict[str, Any]:
        """State, reason, and the record of topic ``metrics.progress``; returns at once."""
        return {**(self._sink.totals() if self._sink is not None else {}), **self._job_record(), **self._restored}

    def run_batch(
        self, archive: str | None = None, asked: Mapping[str, Any] | None = None, catalogue: str | None = None
    ) -> dict[str, Any]:
        """The batch report over everything in the ratings topic, or an archive, in pool ``batch`` of this Spark application.

        Args:
            archive: what to read in place of the topic, a Hadoop URI.
            asked: settings by name that must be this stage's.
            catalogue: digest of the catalogue that this stage must have; None = whichever it has.

        Raises:
            ConfigurationError: this stage's settings are others, or the archive has no ratings.
            ProcessingError: Spark is not up yet.
        """
        from ray_pipeline.windows.batch import refuse_others, report

        refuse_others(self._settings, self._bootstrap, asked or {}, catalogue)
        if self._owner is None:
            msg = "Spark is not up yet"
            raise ProcessingError(msg, "Try again in a moment")
        return report(self._owner.session, self._settings, self._bootstrap, archive)

    def start_history(self, order: ParquetOrder | int) -> None:
        """Begin to make history, in pool ``generator`` of this Spark application; see :meth:`history_status`.

        Args:
            order: what to write as Parquet; a number = so many ratings into the topic, in place of the generator's actors.

        Raises:
            ConfigurationError: some is being made already.
            ProcessingError: Spark is not up yet.
        """
        if self._owner is None:
            msg = "Spark is not up yet"
            raise ProcessingError(msg, "Try again in a moment")
        if self._history is not None and self._history.running:
            raise ConfigurationError(problem="a backfill runs already", fix="Wait for its end")
        spark = self._owner.session
        if isinstance(order, ParquetOrder):
            self._history = SparkJob(spark, order.total, lambda _: write_parquet(spark, order))
        else:
            self._history = SparkJob(spark, order, lambda job: self._send_history(spark, order, job))
        self._history.start()

    def history_status(self) -> dict[str, Any]:
        """How the last backfill stands, see :meth:`SparkJob.status`; returns at once."""
        if self._history is None:
            msg = "the Spark job was started anew, and the backfill ended with it"
            raise ProcessingError(msg, "Start it again")
        return self._history.status()

    def cancel_history(self) -> None:
        """End the backfill; does not wait."""
        if self._history is not None:
            self._history.cancel()

    # -- inside

    def _send_history(self, spark: Any, events: int, job: SparkJob) -> None:
        """Send ratings in place of the actors; the windows wait until all partitions have theirs.

        Partitions come one after another where there are fewer cores than partitions: a query that read the first ones meanwhile
        would take the others' ratings for late.
        """
        with Loan(self._settings, self._bootstrap, events, job.reached) as loan, self._windows_wait():
            settings = loan.settings
            send(spark, settings, self._bootstrap, ModelSource(settings, load_catalogue(settings)), loan.shards)

    @contextlib.contextmanager
    def _windows_wait(self) -> Iterator[None]:
        if self._query is not None and self._query.isActive:
            # nobody sends now: the query is stopped when it is idle, so that no micro-batch is left half published
            self._query.processAllAvailable()
        with self._looking:
            waits = self._state == "running"
            if waits:
                self._state, self._reason = "waiting", "a backfill is being sent"
                self._query.stop()
        try:
            yield
        finally:
            with self._looking:
                if waits and self._state == "waiting" and not self._end.is_set():
                    self._state = "running"  # should it not start now, the heartbeat finds it ended, and tries again
                    self.start_query()

    def _progress(self) -> BatchProgress:
        """The last micro-batch: of a query that has just begun again that of the checkpoint, of an ended JVM the last one seen."""
        if self._query is not None and self._owner is not None and not self._owner.jvm_ended():
            seen = self._progress_seen
            found = read_progress(self._query) or seen
            # a query that goes on from its checkpoint does not tell the watermark before it has read something
            self._progress_seen = (
                found if found.watermark_ms else dataclasses.replace(found, watermark_ms=seen.watermark_ms)
            )
        return self._progress_seen

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
            "state_bytes": last.state_bytes,
            "dropped_groups": last.dropped_groups,
            "lag": self._lag,
            "trigger_interval_ms": self._settings.trigger_interval_ms,
            "query_restarts": self._query_restarts,
            "spark_rebuilds": self._spark_rebuilds,
            "executors": self._executors,
            "executors_hold": self._executors_hold,
            "executors_wanted": self._settings.executors if self._master is None else 0,
            "application": self._app_name,
            "pid": os.getpid(),
            "query": QUERY,
            "pool": self._pool,
            "pools": self._pools,
            "window_types": [spec.name for spec in self._specs],
            "archive": None if self._archive is None else self._archive.record(),
        }

    def _final_through_ms(self) -> int:
        """Windows that end by this event time are final, and published."""
        return self._sink.watermark_ms if self._sink is not None else 0

    def _beat(self) -> None:
        with contextlib.closing(
            Backlog(self._bootstrap, self._settings.ratings_topic, self._settings.partitions)
        ) as backlog:
            while not self._end.wait(_HEARTBEAT_S):
                try:
                    with self._looking:
                        self._look_at_spark()
                        read = self._progress().end_offsets
                    self._measure_lag(backlog, read)
                    if self._sink is not None:
                        with self._publishing:
                            self._sink.publish_job()
                except Exception as error:  # noqa: BLE001 - a heartbeat that fails is late, and lateness is what is shown
                    _log.warning("heartbeat of the windowing job: %s", error)

    def _measure_lag(self, backlog: Backlog, read: Mapping[int, int]) -> None:
        """What Spark itself says of it is how it stood when a micro-batch was planned: 0, however long the micro-batches are."""
        try:
            self._lag = backlog.behind(read)
        except KafkaException as error:  # the broker is away, and others say so
            _log.info("lag of the windowing job: %s", error)

    def _look_at_spark(self) -> None:
        assert self._owner is not None
        if self._state not in ("running", "stuck", "waiting"):
            return
        if self._owner.jvm_ended():
            self._executors, self._executors_hold = 0, {}
            self._give_spark_up("the JVM of the Spark driver has ended")
            return
        self._executors = self._owner.executors_alive()
        self._executors_hold = executor_usage(self.spark)
        self._pools = scheduler_pools(self.spark)
        if self._pool is None and self._query.isActive:
            self._pool = pool_of_jobs(self.spark.sparkContext, str(self._query.runId))
        gone = self._executors < self._watchdog.wanted and self._owner.master_is_gone()
        if self._watchdog.observe(self._clock.now_ms(), self._executors, gone):
            self._give_spark_up(
                "RayDP's master has ended"
                if gone
                else f"{self._executors} of {self._watchdog.wanted} Spark executors have been alive for "
                f"{self._watchdog.patience_ms // 1000} s"
            )
        elif self._state == "running" and not self._query.isActive:
            self._query_ended()
        elif self._archive is not None and (given_up := self._archive.look()) is not None:
            self._state, self._reason = "failed", given_up

    def _give_spark_up(self, reason: str) -> None:
        """Say that Spark must be built anew: who started this process does that, by starting another in its place."""
        if self._state == "stuck":
            return
        self._spark_rebuilds += 1
        # told before it can be seen: whoever sees it ends this process, and the next one counts on from what was told
        try:
            assert self._sink is not None
            with self._publishing:
                self._sink.publish_job(state="stuck", reason=reason)
        except Exception as error:  # noqa: BLE001 - Spark is no better for it
            _log.warning("job record of the windowing job: %s", error)
        self._state, self._reason = "stuck", reason

    def _query_ended(self) -> None:
        fatal, reason = _why(self._query.exception(), self._settings)
        _log.error("the streaming query ended: %s", reason)
        if fatal or self._policy.failed(self._clock.now_ms()) is Decision.GIVE_UP:
            self._state, self._reason = "failed", reason
            return
        self._query_restarts += 1
        self._reason = reason
        if not self._clock.wait(self._end, self._policy.backoff_s):
            try:
                self.start_query()
            except (CheckpointError, ConfigurationError) as error:
                self._state, self._reason = "failed", str(error)
            except Exception as error:  # noqa: BLE001 - the next beat tries again, and the policy ends it
                _log.warning("the streaming query did not start again: %s", error)

    def _check_marker(self, spark: Any, checkpoint: str) -> None:
        """Refuse a checkpoint whose state means something else than these settings do."""
        uri = f"{checkpoint.rstrip('/')}/{MARKER}"
        text = read_text(spark, uri)
        if text is None:
            replace(spark, uri, json.dumps(marker_for(self._settings)).encode())
            return
        different = mismatch(self._settings, text)
        if different is not None:
            raise StateMismatchError(
                problem=f"the checkpoint {checkpoint} is of another configuration: {different}",
                fix=f"Give the former value, another --checkpoint, or {way_to_clear(self._settings)}",
            )

    def _restore(self, spark: Any, checkpoint: str, sink: BatchSink) -> None:
        committed = [int(name) for name in list_names(spark, f"{checkpoint.rstrip('/')}/commits") if name.isdigit()]
        if not committed:
            return
        newest = max(committed)
        from py4j.protocol import Py4JJavaError
        from pyspark.sql import functions as F

        names = [*(f"a{i}" for i in range(5)), "max_offset", "max_rejected", "max_event_ms"]
        shape = "struct<" + ",".join(f"{name}:bigint" for name in names) + ">"
        assert spark.streams.active is not None  # asking makes the coordinator that the state's reader reports to
        value = newest_of_key(self._bootstrap, self._settings.job_topic, "job", 60.0)
        last = json.loads(value) if value else None
        if last is not None:
            self._spark_rebuilds = max(self._spark_rebuilds, int(last.get("spark_rebuilds", 0)))
        try:
            with plain_uri(checkpoint) as address:
                state = spark.read.format("statestore").load(address)
                key, held = F.col("key"), F.col("value").cast(shape).alias("v")
                rows = state.select(key["pane_ms"].alias("pane_ms"), key["id"].alias("id"), held)
                groups = to_groups(rows.select("pane_ms", "id", "v.*").toArrow())
        except Py4JJavaError as error:
            reason = state_problem(str(error))
            if reason is None:
                raise
            broken = BrokenFile(f"state/{newest}", reason, newest=True)
            raise CheckpointError(
                problem=f"the state of batch {newest} in the checkpoint {checkpoint} is broken: {reason}",
                fix=broken.way_out,
            ) from error
        said = read_text(spark, f"{checkpoint.rstrip('/')}/offsets/{newest}") or ""
        self._progress_seen = planned_progress(newest, said)
        sink.restore(groups, self._progress_seen.watermark_ms or 0, last)

    def _read_rejects(self, partition: int, first: int, last: int) -> list[dict[str, Any]]:
        assert self._owner is not None
        topic = self._settings.ratings_topic
        raw = (
            self._owner.session.read.format("kafka")
            .options(**source_options(self._bootstrap))
            .option("assign", json.dumps({topic: [partition]}))
            .option("startingOffsets", json.dumps({topic: {str(partition): first}}))
            .option("endingOffsets", json.dumps({topic: {str(partition): last + 1}}))
            .option("failOnDataLoss", "false")  # the first offset may be a marker's, or cleaned away already
            .load()
        )
        found = rejected(in_contract_form(raw, self._settings), self._settings.guard_ms)
        rows: list[dict[str, Any]] = with_values_of(raw, found, self._settings).toArrow().to_pylist()
        return rows


def _check_files(spark: Any, checkpoint: str) -> None:
    """Refuse a checkpoint with a broken file, before Spark does so in words of its own."""
    folder = checkpoint.rstrip("/")

    def read(name: str) -> str:
        try:
            return read_text(spark, f"{folder}/{name}") or ""
        except OSError as error:  # such as a checksum that does not fit
            raise ValueError(str(error)) from error

    broken = find_broken(lambda name: list_names(spark, f"{folder}/{name}"), read)
    if broken is not None:
        raise CheckpointError(
            problem=f"file {broken.name} of the checkpoint {checkpoint} is broken: {broken.reason}", fix=broken.way_out
        )


def _why(exception: Any, settings: Settings) -> tuple[bool, str]:
    """Whether starting the query again is no help, and the useful line of what ended it."""
    text = str(exception) if exception is not None else "it was stopped from outside"
    if "KAFKA_DATA_LOSS" in text or "failOnDataLoss" in text or "Some data may have been lost" in text:
        return True, (
            f"records of topic {settings.ratings_topic} that the checkpoint has not read yet are gone (topic deleted, "
            f"emptied or aged out). Give another --checkpoint, or {way_to_clear(settings)}"
        )
    if "No space left on device" in text:
        return False, (
            f"a disk is full: that of the checkpoint {settings.checkpoint_uri}, or of Spark's local files. Free some space: the job "
            "goes on where it was, nothing is skipped"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if (refused := next((line for line in reversed(lines) if _NOT_ALLOWED.search(line)), None)) is not None:
        return True, f"{refused.removesuffix(RIGHTS).rstrip('. ')[:500]}. {RIGHTS}"
    return False, next((line for line in lines if "Error" in line or "Exception" in line), lines[0])[:500]
