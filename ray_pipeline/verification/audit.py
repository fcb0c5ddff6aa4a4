"""Reads a run's topics back and compares them with what must be there. Needs the brokers alone: the run published its configuration."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from ray_pipeline.codec import parse_object
from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress, progress_key
from ray_pipeline.errors import BrokerUnavailableError, RayPipelineError, RecordError, UncheckedError
from ray_pipeline.formats.factory import open_format
from ray_pipeline.generator.plan import NEVER_MS
from ray_pipeline.kafka.client import make_consumer, watermark_offsets
from ray_pipeline.kafka.read import FILLED_S, Backlog, Record, newest_of_key, read_topic, read_topic_from
from ray_pipeline.kafka.topics import partitions_of
from ray_pipeline.model.catalogue import Catalogue, load_catalogue
from ray_pipeline.truth.audit import KINDS, Finding, PartitionAudit, PartitionVerdict
from ray_pipeline.truth.oracle import published_windows
from ray_pipeline.truth.replay import (
    ProgressRecords,
    ShardReplay,
    build_models,
    checked_run,
    published_catalogue,
    published_settings,
)
from ray_pipeline.truth.window_audit import WindowAudit, WindowsVerdict
from ray_pipeline.verification.outside import OutsideLedger

__all__ = ["AuditReport", "PublishedRun", "audit", "published_run"]

_AT_ONCE = 10_000
_WORTH_A_PROCESS = 200_000
"""Records for which another process pays: to start one takes about as long as to compare so many."""
_IDLE_DEADLINE_S = 60.0
_NEXT_BATCH_S = 15.0
"""How long the job is waited for, where it goes on, to read ratings that were sent too late for what is final."""
_LOOK_AGAIN_S = 0.5
_LISTED = 20
_WINDOW_COUNTS = ("checked", "wrong", "late_dropped", "pending", "other_definition")


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """What a run says of itself in topic ``ratings.progress``.

    Attributes:
        settings: one's own, with the run's events and windows.
        run: record ``run``.
        windows: record ``windows``; None where no job has published it.
        progress: the shards, by partition.
        findings: records that cannot be what the run or a shard wrote.
        unchecked: partitions of which nothing that can be true is left of what their shards said, with the reason.
    """

    settings: Settings
    run: dict[str, Any]
    windows: dict[str, Any] | None
    progress: dict[int, ShardProgress]
    findings: list[Finding] = field(default_factory=list)
    unchecked: dict[int, str] = field(default_factory=dict)

    def at_its_topics(self) -> PublishedRun:
        """The same, to be read from the topics that run and job have named; what one's own settings were given stays."""
        windows = self.windows or {}
        told = {
            "ratings_topic": self.run.get("topic"),
            "outside_topic": self.run.get("outside_topic"),  # a run from before it was published names none
            "metrics_topic": windows.get("metrics_topic"),
            "batches_topic": windows.get("batches_topic"),
        }
        given = self.settings.model_fields_set
        topics = {name: topic for name, topic in told.items() if topic is not None and name not in given}
        return replace(self, settings=self.settings.model_copy(update=topics))


@dataclass
class AuditReport:
    """The result.

    Attributes:
        verdict: ``agreed``, ``disagreed`` or ``unchecked``.
        reason: why it, or a part of it, could not be checked; empty otherwise.
        run: id of the run.
        records: ``expected``, ``found``, ``outside`` (ratings that were posted, known by topic ``ratings.outside``, and are in
            neither of the two), and the number of each kind of wrong record.
        partitions: the same by partition.
        by_design: records that are broken on purpose, by kind; they are among the expected ones, and right as they are.
        windows: ``checked``, ``wrong``, ``late_dropped``, ``pending``, ``other_definition``; and ``reason`` where they could not
            be checked.
        findings: what is wrong, the first 20 of each kind and partition.
        records_per_s: how fast the ratings were read and compared.
        duration_s: how long it all took.
    """

    verdict: str = "unchecked"
    reason: str = ""
    run: str = ""
    records: dict[str, int] = field(default_factory=dict)
    partitions: dict[str, dict[str, int]] = field(default_factory=dict)
    by_design: dict[str, int] = field(default_factory=dict)
    windows: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    records_per_s: float = 0.0
    duration_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def published_run(settings: Settings, bootstrap: str) -> PublishedRun:
    """Read what a run published.

    Raises:
        UncheckedError: there is no run, or it cannot be regenerated here.
        StateMismatchError: catalogue or model file at hand are not the run's.
        BrokerUnavailableError: the topic cannot be read.
    """
    topic = settings.progress_topic
    newest: dict[str, dict[str, Any]] = {}
    untrue: dict[str, list[Finding]] = {}
    shards: dict[str, deque[Record]] = {}
    for record in read_topic(bootstrap, topic):
        key = record.key or ""
        if key.startswith("shard/"):
            shards.setdefault(key if _names_partition(key) else "shard/", deque(maxlen=_LISTED)).append(record)
        elif key in ("run", "windows"):
            value = parse_object(record.value)
            try:
                checked_run(settings, value) if key == "run" else published_windows(settings, value)
                newest[key], untrue[key] = value or {}, []
            except RecordError as error:
                untrue[key] = [*untrue.get(key, []), _untrue(None, record, error)][:_LISTED]
    if "run" not in newest:
        wrong = next((f": {findings[-1].detail}" for findings in untrue.values() if findings), "")
        raise UncheckedError(
            problem=f"topic {topic} at {bootstrap} has no record of a run{wrong}",
            fix="Check --bootstrap-servers and --progress-topic",
        )
    found = published_settings(settings, newest["run"], published_catalogue(settings, newest["run"]))
    windows = newest.get("windows")
    if windows is not None:
        found = published_windows(found, windows)
    run = PublishedRun(found, newest["run"], windows, {}, [f for findings in untrue.values() for f in findings])
    _read_progress(run, bootstrap, shards)
    return run


def _names_partition(key: str) -> bool:
    number = key.removeprefix("shard/")
    return number.isascii() and number.isdecimal() and len(number) <= 5


def _read_progress(run: PublishedRun, bootstrap: str, shards: Mapping[str, Sequence[Record]]) -> None:
    """The newest progress of each shard that can be true, and those newer ones that cannot.

    Args:
        run: is completed.
        bootstrap: brokers, HOST:PORT[,…].
        shards: the newest records of each key; those of keys that name no partition together.
    """
    records, hidden = ProgressRecords(run.settings, run.run), {}
    partitions = {progress_key(p): p for p in range(run.settings.partitions)}
    for key, newest in sorted(shards.items()):
        partition = partitions.get(key)
        for record in reversed(newest):
            try:
                progress = records.read(record.key or "", parse_object(record.value))
                run.progress[progress.partition] = progress
                break
            except RecordError as error:
                if sum(f.partition == partition for f in run.findings) < _LISTED:
                    run.findings.append(_untrue(partition, record, error))
        else:
            if partition is not None:
                hidden[key] = partition
    if not hidden:
        return
    # so many that the true ones lie before all of those that were kept
    for record in read_topic(bootstrap, run.settings.progress_topic):
        if record.key in hidden:
            with contextlib.suppress(RecordError):  # the newest of these were named above
                run.progress[hidden[record.key]] = records.read(record.key, parse_object(record.value))
    for key, partition in hidden.items():
        if partition not in run.progress:
            run.unchecked[partition] = (
                f"no record {key} in topic {run.settings.progress_topic} can be what the shard wrote"
            )


def _untrue(partition: int | None, record: Record, error: RecordError) -> Finding:
    where = f"record {(record.key or '')[:80]} at offset {record.offset} of topic {record.topic}"
    return Finding("progress", partition, None, None, f"{where}: {error.problem}")


def audit(
    settings: Settings,
    bootstrap: str,
    from_ms: int | None = None,
    to_ms: int | None = None,
    processes: int | None = None,
) -> AuditReport:
    """Compare everything that a run left in Kafka with what must be there.

    Args:
        settings: names the progress topic and the catalogue; events and windows are the run's own, and so are the other topics
            but for those that were given by name.
        bootstrap: brokers, HOST:PORT[,…].
        from_ms: event time from which on to look, epoch milliseconds; None = the beginning.
        to_ms: event time up to which to look (exclusive); None = the end.
        processes: how many read side by side; None = as many as pay for what is in the topic, at most one a core and a partition.
    """
    began = time.monotonic()
    report = AuditReport()
    try:
        run = published_run(settings, bootstrap).at_its_topics()
        catalogue = load_catalogue(run.settings)
        report.run = str(run.run["run"])
        report.findings += run.findings
        report.reason = "; ".join(f"partition {p}: {reason}" for p, reason in sorted(run.unchecked.items()))
        verdicts = _audit_records(run, bootstrap, from_ms, to_ms, processes)
        report.records_per_s = sum(v.found for v in verdicts) / max(time.monotonic() - began, 1e-9)
        _add_records(report, verdicts)
        with _brokers():
            windows, reason = _audit_windows(run, bootstrap, catalogue, from_ms, to_ms)
            left = _left_by_a_job(run.settings, bootstrap) if reason and not windows.wrong else ""
        report.windows = {**{name: getattr(windows, name) for name in _WINDOW_COUNTS}, "reason": reason}
        report.findings += windows.findings
        if left:
            report.reason = "; ".join(filter(None, (report.reason, f"{reason}, but topic {left} holds what one wrote")))
        wrong = any(report.records[kind] for kind in KINDS) or windows.wrong or run.findings
        report.verdict = "disagreed" if wrong else "unchecked" if report.reason else "agreed"
    except RayPipelineError as error:
        report.verdict, report.reason = "unchecked", str(error)
    report.duration_s = round(time.monotonic() - began, 3)
    report.records_per_s = round(report.records_per_s, 1)
    return report


@contextlib.contextmanager
def _brokers() -> Iterator[None]:
    """What Kafka's client raises, as an error of ours: one that can be sent from another process, too."""
    try:
        yield
    except KafkaException as error:
        raise BrokerUnavailableError(
            problem=f"Kafka does not answer: {error.args[0].str()}", fix="Check --bootstrap-servers, and audit again"
        ) from None


# -- records


def _add_records(report: AuditReport, verdicts: list[PartitionVerdict]) -> None:
    for verdict in verdicts:
        row = {"expected": verdict.expected, "found": verdict.found, "outside": verdict.outside, **verdict.counts}
        report.partitions[str(verdict.partition)] = row
        report.findings += verdict.findings
        for kind, count in verdict.by_design.items():
            report.by_design[kind] = report.by_design.get(kind, 0) + count
    names = ("expected", "found", "outside", *KINDS)
    report.records = {name: sum(row[name] for row in report.partitions.values()) for name in names}


def _audit_records(
    run: PublishedRun, bootstrap: str, from_ms: int | None, to_ms: int | None, processes: int | None
) -> list[PartitionVerdict]:
    settings = run.settings
    there = partitions_of(bootstrap, [settings.ratings_topic]).get(settings.ratings_topic)
    if there != settings.partitions:
        raise UncheckedError(
            problem=f"topic {settings.ratings_topic} has {there or 'no'} partitions, the run has {settings.partitions}",
            fix="Check --ratings-topic",
        )
    partitions = [p for p in range(settings.partitions) if p not in run.unchecked]
    workers = max(1, min(processes or _worth_starting(settings, bootstrap), len(partitions)))
    jobs = [(settings, bootstrap, run, partitions[n::workers], from_ms, to_ms) for n in range(workers)]
    if workers == 1:
        return _audit_partitions(*jobs[0])
    # a fresh interpreter each: librdkafka does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = [pool.submit(_audit_partitions, *job) for job in jobs]
        return sorted((v for part in parts for v in part.result()), key=lambda v: v.partition)


@_brokers()
def _worth_starting(settings: Settings, bootstrap: str) -> int:
    """How many processes pay: the records of a small topic are compared before another one has imported what it needs."""
    with contextlib.closing(Backlog(bootstrap, settings.ratings_topic, settings.partitions)) as topic:
        records = topic.behind({}, timeout_s=15.0)
    return min(os.cpu_count() or 1, 1 + records // _WORTH_A_PROCESS)


@_brokers()
def _audit_partitions(
    settings: Settings,
    bootstrap: str,
    run: PublishedRun,
    partitions: list[int],
    from_ms: int | None,
    to_ms: int | None,
) -> list[PartitionVerdict]:
    models = build_models(settings, load_catalogue(settings), partitions)
    ledger, records = OutsideLedger(settings, bootstrap), ProgressRecords(settings, run.run)
    verdicts = []
    for partition in partitions:
        outside = _OutsideOf(ledger, partition)
        progress = run.progress.get(partition)
        if progress is None:
            verdict = _without_progress(settings, bootstrap, partition, outside)
            progress = _progress_by_now(settings, bootstrap, partition, records) if verdict.found else None
            if progress is None:
                verdicts.append(verdict)
                continue
            outside = _OutsideOf(ledger, partition)  # the shard began while its partition was read
        replay = ShardReplay(models[partition], progress, settings.guard_ms)
        first = 0 if from_ms is None else min(progress.next_index, replay.count_before(from_ms))
        end = progress.next_index if to_ms is None else min(progress.next_index, replay.count_before(to_ms))
        one = PartitionAudit(replay, end, first, bounded=to_ms is not None, is_outside=outside.holds)
        for keys, values, offsets in _blocks(settings, bootstrap, partition, one, end if to_ms is not None else None):
            outside.read_on(offsets[0], offsets[-1])
            one.take(keys, values, offsets.__getitem__)
        sent_by_now = functools.partial(_sent_by_now, settings, bootstrap, partition, progress, records)
        verdict = one.finish(sent_by_now if to_ms is None else None)
        outside.count_into(verdict, from_ms, to_ms)
        verdicts.append(verdict)
    ledger.close()
    return verdicts


class _OutsideOf:
    """The ratings from outside in one partition, looked up as its records are read."""

    def __init__(self, ledger: OutsideLedger, partition: int) -> None:
        self._ledger = ledger
        self._partition = partition
        self._fresh = False
        self._first: int | None = None
        self._end = 0

    def read_on(self, first: int, last: int) -> None:
        """More records have been read, from one offset to another: the ledger may know more by now."""
        self._fresh = False
        self._first = first if self._first is None else self._first
        self._end = last + 1

    def holds(self, offset: int, key: bytes | None, value: bytes | None) -> bool:
        """Whether a record is one of them."""
        if not self._fresh:
            self._ledger.refresh()
            self._fresh = True
        return self._ledger.ratings.holds(self._partition, offset, key, value)

    def count_into(self, verdict: PartitionVerdict, from_ms: int | None, to_ms: int | None) -> None:
        """Note those of a time; where all was looked at, note as missing what is not as it was written."""
        if self._first is None:
            return
        known = self._ledger.refresh().between(self._partition, self._first, self._end)
        times = known.timestamps_ms
        if from_ms is not None or to_ms is not None:
            verdict.outside = int(((times >= (from_ms or 0)) & (times < (to_ms or NEVER_MS))).sum())
        elif len(known) > verdict.outside:
            missing = len(known) - verdict.outside
            verdict.counts["missing"] += missing
            text = f"{missing:,} ratings that were posted are not, or not as they were written, where topic ratings.outside has them"
            verdict.findings.append(Finding("missing", self._partition, None, None, text))


def _without_progress(settings: Settings, bootstrap: str, partition: int, outside: _OutsideOf) -> PartitionVerdict:
    """A shard that never said that it sent anything: whatever is there is not its own."""
    verdict = PartitionVerdict(partition, 0)
    text = "the shard of this partition has said of no rating that it was sent"
    for keys, values, offsets in _blocks(settings, bootstrap, partition, None, None):
        outside.read_on(offsets[0], offsets[-1])
        for key, value, offset in zip(keys, values, offsets, strict=True):
            if outside.holds(offset, key, value):
                verdict.outside += 1
                continue
            verdict.found += 1
            verdict.counts["foreign"] += 1
            if len(verdict.findings) < _LISTED:
                verdict.findings.append(Finding("foreign", partition, None, offset, text))
    return verdict


def _sent_by_now(
    settings: Settings, bootstrap: str, partition: int, before: ShardProgress, records: ProgressRecords
) -> int:
    """How far a shard is by now: it may have gone on while its partition was read."""
    later = _progress_by_now(settings, bootstrap, partition, records)
    if later is None or later.committed_ms <= before.committed_ms:
        return before.next_index
    return max(before.next_index, later.next_index)


def _progress_by_now(
    settings: Settings, bootstrap: str, partition: int, records: ProgressRecords
) -> ShardProgress | None:
    """What a shard says by now; None where that is nothing that can be true."""
    key = progress_key(partition)
    newest = newest_of_key(bootstrap, settings.progress_topic, key, _IDLE_DEADLINE_S)
    try:
        return records.read(key, parse_object(newest))
    except RecordError:  # named where all of them were read
        return None


def _blocks(
    settings: Settings, bootstrap: str, partition: int, one: PartitionAudit | None, until: int | None
) -> Iterator[tuple[list[bytes | None], list[bytes | None], list[int]]]:
    """Keys, values and offsets of a partition's committed records, up to where it ends now, or a rating that is late enough."""
    topic, wire = settings.ratings_topic, open_format(settings)
    uncommitted = make_consumer(bootstrap, isolation_level="read_uncommitted")
    try:
        low, end = watermark_offsets(uncommitted, topic, partition)
    finally:
        uncommitted.close()
    consumer = make_consumer(bootstrap, queued_max_messages_kbytes=65_536, fetch_wait_max_ms=50)
    place = [TopicPartition(topic, partition, low)]
    deadline = time.monotonic() + _IDLE_DEADLINE_S
    try:
        consumer.assign(place)
        while low < end:
            messages = consumer.consume(_AT_ONCE, timeout=FILLED_S)
            if any(m.error() is not None for m in messages):
                for message in messages:
                    error = message.error()
                    if error is not None and error.code() != KafkaError._PARTITION_EOF:
                        raise BrokerUnavailableError(problem=f"reading topic {topic}: {error.str()}", fix="Try again")
                messages = [m for m in messages if m.error() is None]
            if messages and (messages[-1].offset() or 0) >= end:
                messages = [m for m in messages if (m.offset() or 0) < end]
            if messages:
                deadline = time.monotonic() + _IDLE_DEADLINE_S
                keys = [m.key() for m in messages]
                yield keys, wire.from_wire([m.value() for m in messages]), _Offsets(messages)
            if until is not None and one is not None and one.reached >= until:
                return
            if consumer.position(place)[0].offset >= end:
                return
            if time.monotonic() > deadline:
                raise UncheckedError(
                    problem=f"partition {partition} of topic {topic} could not be read to its end within "
                    f"{_IDLE_DEADLINE_S:.0f} s: a transaction is open",
                    fix="Try again when no shard hangs",
                )
    finally:
        consumer.close()


class _Offsets(list[int]):
    """Offsets of messages, looked up only where they are asked for."""

    def __init__(self, messages: Sequence[Any]) -> None:
        super().__init__()
        self._messages = messages

    def __getitem__(self, at: Any) -> Any:
        return self._messages[at].offset()

    def __iter__(self) -> Iterator[int]:
        return (message.offset() for message in self._messages)


# -- windows


def _audit_windows(
    run: PublishedRun, bootstrap: str, catalogue: Catalogue, from_ms: int | None, to_ms: int | None
) -> tuple[WindowsVerdict, str]:
    """What is wrong with the windows; and why they could not be checked, if so."""
    settings = run.settings
    if run.windows is None:
        return WindowsVerdict(), "no job has published what its windows are"
    windows, last = WindowAudit(settings), -1
    for record in read_topic(bootstrap, settings.batches_topic):
        windows.take_cut(record.offset, record.value)
        last = record.offset
    # after the cuts, so that of each of them all windows are there
    for record in read_topic(bootstrap, settings.metrics_topic):
        windows.take_window(record.offset, record.key or "", record.value)
    run = published_run(settings, bootstrap)  # and this too: what was read was sent before
    later = _take_later_cuts(windows, settings, bootstrap, last)
    if run.unchecked:
        return windows.verdict, f"what they must hold is not known: {next(iter(run.unchecked.values()))}"
    ledger = OutsideLedger(settings, bootstrap)
    outside = ledger.refresh()
    models = build_models(settings, catalogue, run.progress)
    replays = {p: ShardReplay(models[p], progress, settings.guard_ms) for p, progress in run.progress.items()}
    found = windows.compare(catalogue, replays, outside, from_ms, to_ms)
    deadline = time.monotonic() + _NEXT_BATCH_S
    while (unread := windows.unread(outside)).wrong and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN_S)
        later = _take_later_cuts(windows, settings, bootstrap, later)
        ledger.refresh()
    ledger.close()
    found.wrong += unread.wrong
    found.findings += unread.findings
    return found, "no job has read anything yet" if last < 0 else ""


def _take_later_cuts(windows: WindowAudit, settings: Settings, bootstrap: str, last: int) -> int:
    """Take in what micro-batches have said after an offset; returns the last offset."""
    for record in read_topic_from(bootstrap, settings.batches_topic, 0, last + 1):
        windows.take_later_cut(record.value)
        last = record.offset
    return last


def _left_by_a_job(settings: Settings, bootstrap: str) -> str:
    """A topic that holds what only a job writes that has read something; empty where none has."""
    topics = [settings.metrics_topic, settings.batches_topic, settings.job_topic]
    there = partitions_of(bootstrap, topics)
    for topic in (name for name in topics if name in there):
        for record in read_topic(bootstrap, topic):
            batch = (parse_object(record.value) or {}).get("batch")
            if topic != settings.job_topic or (isinstance(batch, int) and batch >= 0):
                return topic
    return ""
