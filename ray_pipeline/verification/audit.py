"""Reads a run's topics back and compares them with what must be there. Needs the brokers alone: the run published its configuration."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from typing import Any

from confluent_kafka import KafkaError, TopicPartition

from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress, progress_key
from ray_pipeline.errors import BrokerUnavailableError, RayPipelineError, UncheckedError
from ray_pipeline.formats.factory import open_format
from ray_pipeline.generator.plan import NEVER_MS, ShardSchedule
from ray_pipeline.kafka.client import make_consumer, watermark_offsets
from ray_pipeline.kafka.read import Record, newest_of_key, read_topic
from ray_pipeline.kafka.topics import partitions_of
from ray_pipeline.model.catalogue import Catalogue, load_catalogue
from ray_pipeline.model.population import build_user_map
from ray_pipeline.truth.audit import KINDS, Finding, PartitionAudit, PartitionVerdict
from ray_pipeline.truth.oracle import expected_key, published_windows
from ray_pipeline.truth.outside import OutsideRatings
from ray_pipeline.truth.replay import ShardReplay, build_models, published_catalogue, published_settings
from ray_pipeline.truth.verdict import compare
from ray_pipeline.truth.windows import Cut, ExpectedWindows
from ray_pipeline.verification.outside import OutsideLedger
from ray_pipeline.windows.spec import epoch_ms, iso_ms, window_specs

__all__ = ["AuditReport", "PublishedRun", "audit", "published_run"]

_AT_ONCE = 10_000
_IDLE_DEADLINE_S = 60.0
_TOGETHER = 200_000
_LISTED = 20


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """What a run says of itself in topic ``ratings.progress``.

    Attributes:
        settings: one's own, with the run's events and windows.
        run: record ``run``.
        windows: record ``windows``; None where no job has published it.
        progress: the shards, by partition.
        findings: records that cannot be what a shard wrote.
    """

    settings: Settings
    run: dict[str, Any]
    windows: dict[str, Any] | None
    progress: dict[int, ShardProgress]
    findings: tuple[Finding, ...]


@dataclass
class AuditReport:
    """The result.

    Attributes:
        verdict: ``agreed``, ``disagreed`` or ``unchecked``.
        reason: why it could not be checked; empty otherwise.
        run: id of the run.
        records: ``expected``, ``found``, ``outside`` (ratings that were posted, known by topic ``ratings.outside``, and are in
            neither of the two), and the number of each kind of wrong record.
        partitions: the same by partition.
        by_design: records that are broken on purpose, by kind; they are among the expected ones, and right as they are.
        windows: ``checked``, ``wrong``, ``late_dropped``, ``pending``; and ``reason`` where they could not be checked.
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
        BrokerUnavailableError: the topic cannot be read.
    """
    newest: dict[str, dict[str, Any]] = {}
    shards: dict[int, list[dict[str, Any]]] = {}
    for record in read_topic(bootstrap, settings.progress_topic):
        if record.key is None or record.value is None:
            continue
        try:
            value = json.loads(record.value)
        except ValueError:
            value = {}
        if record.key.startswith("shard/"):
            kept = shards.setdefault(int(record.key.removeprefix("shard/")), [])
            kept.append(value)
            del kept[:-_LISTED]
        else:
            newest[record.key] = value
    if "run" not in newest:
        raise UncheckedError(
            problem=f"topic {settings.progress_topic} at {bootstrap} has no record of a run",
            fix="Check --bootstrap-servers and --progress-topic",
        )
    found = published_settings(settings, newest["run"], published_catalogue(settings, newest["run"]))
    windows = newest.get("windows")
    if windows is not None:
        found = published_windows(found, windows)
    progress, findings = _shards(found, newest["run"], shards)
    return PublishedRun(found, newest["run"], windows, progress, tuple(findings))


def _shards(
    settings: Settings, run: dict[str, Any], shards: dict[int, list[dict[str, Any]]]
) -> tuple[dict[int, ShardProgress], list[Finding]]:
    """The newest progress of each shard that can be true, and those newer ones that cannot."""
    user_map = build_user_map(settings)
    progress: dict[int, ShardProgress] = {}
    findings = []
    for partition, records in sorted(shards.items()):
        share, phase = user_map.share(partition), (partition + 0.5) / settings.partitions
        poisson_seed = settings.seed if settings.arrivals == "poisson" else None
        for record in reversed(records):
            reason = _untrue(record, partition, run, share, phase, poisson_seed)
            if not reason:
                progress[partition] = ShardProgress.from_record(record)
                break
            findings.append(
                Finding("progress", partition, record.get("next_index"), None, f"progress record: {reason}")
            )
    return progress, findings


def _untrue(
    record: dict[str, Any], partition: int, run: dict[str, Any], share: float, phase: float, poisson_seed: int | None
) -> str:
    """Why a progress record cannot be what the shard wrote; empty when it can."""
    try:
        said = ShardProgress.from_record(record)
        schedule = ShardSchedule.lived(said)
    except ValueError as error:
        return str(error)
    if said.partition != partition:
        return f"it is of partition {said.partition}"
    for name, has, must in (
        ("run", said.run, run["run"]),
        ("configuration", said.config, run["config"]),
        ("share", said.share, share),
        ("phase", said.phase, phase),
        ("seed of arrivals", said.poisson_seed, poisson_seed),
    ):
        if has != must:
            return f"its {name} is {has}, must be {must}"
    if said.next_index == 0 or said.event_time_ms is None:
        return (
            ""
            if said.next_index == 0 and said.event_time_ms is None
            else "its number of ratings and last time do not fit"
        )
    due_ms = int(schedule.due_ms(said.next_index - 1, 1)[0])
    if due_ms != said.event_time_ms:
        return (
            f"it says that rating {said.next_index - 1:,} was the last, of {iso_ms(said.event_time_ms)}, "
            f"but by its own plan that one is due at {iso_ms(due_ms) if due_ms < 10**14 else 'no time'}"
        )
    return ""


def audit(
    settings: Settings,
    bootstrap: str,
    from_ms: int | None = None,
    to_ms: int | None = None,
    processes: int | None = None,
) -> AuditReport:
    """Compare everything that a run left in Kafka with what must be there.

    Args:
        settings: names the topics and the catalogue; events and windows are the run's own.
        bootstrap: brokers, HOST:PORT[,…].
        from_ms: event time from which on to look, epoch milliseconds; None = the beginning.
        to_ms: event time up to which to look (exclusive); None = the end.
        processes: how many read side by side; None = one a core, at most one a partition.
    """
    began = time.monotonic()
    report = AuditReport()
    try:
        run = published_run(settings, bootstrap)
        catalogue = load_catalogue(run.settings)
        report.run = str(run.run["run"])
        report.findings += run.findings
        verdicts = _audit_records(run, bootstrap, from_ms, to_ms, processes)
        report.records_per_s = sum(v.found for v in verdicts) / max(time.monotonic() - began, 1e-9)
        _add_records(report, verdicts)
        _audit_windows(report, run, bootstrap, catalogue, from_ms, to_ms)
        wrong = any(report.records[kind] for kind in KINDS) or report.windows.get("wrong") or run.findings
        report.verdict = "disagreed" if wrong else "agreed"
    except RayPipelineError as error:
        report.verdict, report.reason = "unchecked", str(error)
    report.duration_s = round(time.monotonic() - began, 3)
    report.records_per_s = round(report.records_per_s, 1)
    return report


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
    partitions = list(range(settings.partitions))
    workers = max(1, min(processes or os.cpu_count() or 1, len(partitions)))
    jobs = [(settings, bootstrap, run, partitions[n::workers], from_ms, to_ms) for n in range(workers)]
    if workers == 1:
        return _audit_partitions(*jobs[0])
    # a fresh interpreter each: librdkafka does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = [pool.submit(_audit_partitions, *job) for job in jobs]
        return sorted((v for part in parts for v in part.result()), key=lambda v: v.partition)


def _audit_partitions(
    settings: Settings,
    bootstrap: str,
    run: PublishedRun,
    partitions: list[int],
    from_ms: int | None,
    to_ms: int | None,
) -> list[PartitionVerdict]:
    models = build_models(settings, load_catalogue(settings), partitions)
    ledger = OutsideLedger(settings, bootstrap)
    verdicts = []
    for partition in partitions:
        outside = _OutsideOf(ledger, partition)
        progress = run.progress.get(partition)
        if progress is None:
            verdicts.append(_without_progress(settings, bootstrap, partition, outside))
            continue
        replay = ShardReplay(models[partition], progress, settings.guard_ms)
        first = 0 if from_ms is None else min(progress.next_index, replay.count_before(from_ms))
        end = progress.next_index if to_ms is None else min(progress.next_index, replay.count_before(to_ms))
        one = PartitionAudit(replay, end, first, bounded=to_ms is not None, is_outside=outside.holds)
        for keys, values, offsets in _blocks(settings, bootstrap, partition, one, end if to_ms is not None else None):
            outside.read_on(offsets[0], offsets[-1])
            one.take(keys, values, offsets.__getitem__)
        verdict = one.finish(_sent_by_now(settings, bootstrap, partition, progress) if to_ms is None else None)
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


def _sent_by_now(settings: Settings, bootstrap: str, partition: int, before: ShardProgress) -> int:
    """How far a shard is by now: it may have gone on while its partition was read."""
    newest = newest_of_key(bootstrap, settings.progress_topic, progress_key(partition), _IDLE_DEADLINE_S)
    try:
        later = ShardProgress.from_json(newest or b"")
    except ValueError:
        return before.next_index
    same = (later.run, later.config, later.share, later.phase) == (
        before.run,
        before.config,
        before.share,
        before.phase,
    )
    return (
        max(before.next_index, later.next_index)
        if same and later.committed_ms > before.committed_ms
        else before.next_index
    )


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
            messages = consumer.consume(_AT_ONCE, timeout=0.1)
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
    report: AuditReport,
    run: PublishedRun,
    bootstrap: str,
    catalogue: Catalogue,
    from_ms: int | None,
    to_ms: int | None,
) -> None:
    settings = run.settings
    report.windows = {"checked": 0, "wrong": 0, "late_dropped": 0, "pending": 0, "reason": ""}
    if run.windows is None:
        report.windows["reason"] = "no job has published what its windows are"
        return
    records = list(read_topic(bootstrap, settings.batches_topic))
    actual = _actual(settings, bootstrap)  # after the cuts, so that of each of them all windows are there
    run = published_run(settings, bootstrap)  # and this too: what was read was sent before
    ledger = OutsideLedger(settings, bootstrap)
    outside = ledger.refresh()
    ledger.close()
    models = build_models(settings, catalogue, run.progress)
    replays = {p: ShardReplay(models[p], progress, settings.guard_ms) for p, progress in run.progress.items()}
    cuts = _cuts(records, replays, outside)
    if not cuts:
        report.windows["reason"] = "no job has read anything yet"
        return
    engine = ExpectedWindows(
        catalogue, window_specs(settings), round(settings.watermark_s * 1000), settings.top_n, from_ms or 0, outside
    )
    check = _WindowCheck(report, actual, cuts[-1].batch, from_ms, to_ms)
    while cuts:
        together = _together(engine, cuts, replays)
        engine.advance_together(cuts[:together], replays)
        del cuts[:together]
        for _, record in engine.close():
            check.one(record, final=True)
    for window in engine.open:
        check.one(engine.record(window), final=False)
    check.rest()
    report.windows["late_dropped"] = engine.late_total[0]
    _unread(report, run, engine, replays)


def _together(engine: ExpectedWindows, cuts: list[Cut], replays: dict[int, ShardReplay]) -> int:
    """How many of the next cuts to take at once: many small ones cost more than the ratings between them."""
    before = sum(engine.read.values())
    most = next((n for n, cut in enumerate(cuts) if sum(cut.read.values()) - before > _TOGETHER), len(cuts))
    while most > 1 and not engine.may_merge(cuts[:most], replays):
        most //= 2
    return max(1, most)


def _cuts(records: Iterable[Record], replays: dict[int, ShardReplay], outside: OutsideRatings) -> list[Cut]:
    """What each micro-batch read, in order; of a query that began anew only what came since."""
    cuts: list[Cut] = []
    for record in records:
        cut = Cut.from_record(json.loads(record.value or b"{}"), outside).in_records(replays)
        # what is not ours is no rating that could be regenerated: it shows among the records
        read = {p: min(n, replays[p].progress.next_index) for p, n in cut.read.items() if p in replays}
        cut = replace(cut, read=read)
        if cuts and cut.batch <= cuts[-1].batch:
            if cut.reaches(cuts[-1].read):
                continue  # the same micro-batch, run again after a failure
            cuts.clear()
        cuts.append(cut)
    return cuts


def _actual(settings: Settings, bootstrap: str) -> dict[str, dict[str, bytes]]:
    """The newest records of topic ``metrics``: by window, then kind."""
    found: dict[str, dict[str, bytes]] = {}
    for record in read_topic(bootstrap, settings.metrics_topic):
        if record.key is not None and record.value is not None:
            window, _, kind = record.key.rpartition("|")
            found.setdefault(window, {})[kind] = record.value
    return found


class _WindowCheck:
    """Compares expected windows with actual ones as they come."""

    def __init__(
        self,
        report: AuditReport,
        actual: dict[str, dict[str, bytes]],
        last_batch: int,
        from_ms: int | None,
        to_ms: int | None,
    ) -> None:
        self._report = report
        self._actual = actual
        self._last_batch = last_batch
        self._from_ms = from_ms or 0
        self._to_ms = to_ms

    def one(self, expected: dict[str, Any], final: bool) -> None:
        """Compare one window."""
        key = expected_key(expected)
        actual = {kind: json.loads(value) for kind, value in self._actual.pop(key, {}).items()}
        if not self._wanted(epoch_ms(expected["window_start"]), epoch_ms(expected["window_end"])):
            return
        if not final and any(int(record["batch"]) > self._last_batch for record in actual.values()):
            self._report.windows["pending"] += 1  # the job went on while this was read
            return
        self._report.windows["checked"] += 1
        wrong = compare(expected, actual)
        if wrong:
            cause = f"; {expected['late']:,} ratings came too late for it, as they must" if expected["late"] else ""
            self._wrong(f"window {expected['window_type']} from {expected['window_start']} {wrong}{cause}")

    def rest(self) -> None:
        """What is left is expected by nobody."""
        for key, kinds in sorted(self._actual.items()):
            name, _, start = key.rpartition("|")
            records = [json.loads(value) for value in kinds.values()]
            if any(int(record.get("batch", -1)) > self._last_batch for record in records):
                self._report.windows["pending"] += 1
            elif self._wanted_record(records[0]):
                self._wrong(f"window {name} from {start} is there, no rating belongs to it")

    def _wanted_record(self, record: dict[str, Any]) -> bool:
        try:
            return self._wanted(epoch_ms(record["window_start"]), epoch_ms(record["window_end"]))
        except (KeyError, ValueError, TypeError):
            return True

    def _wanted(self, start_ms: int, end_ms: int) -> bool:
        """Only windows that lie within what is looked at: the others hold ratings that were left out."""
        return start_ms >= self._from_ms and (self._to_ms is None or end_ms <= self._to_ms)

    def _wrong(self, detail: str) -> None:
        self._report.windows["wrong"] += 1
        if self._report.windows["wrong"] <= _LISTED:
            self._report.findings.append(Finding("window", None, None, None, detail))


def _unread(report: AuditReport, run: PublishedRun, engine: ExpectedWindows, replays: dict[int, ShardReplay]) -> None:
    """Windows that are final although ratings of them have not been read."""
    for partition, progress in run.progress.items():
        read = engine.read.get(partition, 0)
        if read >= progress.next_index:
            continue
        if replays[partition].valid is not None:
            _unread_of(report, replays[partition], read, engine)
            continue
        first_ms = replays[partition].due_ms(read)
        for spec in engine.specs:
            last_ms = min(replays[partition].due_ms(progress.next_index - 1), engine.watermark.evict_ms)
            end_ms = first_ms - first_ms % spec.slide_ms + spec.slide_ms
            if end_ms <= engine.watermark.evict_ms:
                count = (last_ms - end_ms) // spec.slide_ms + 1
                report.windows["wrong"] += max(1, count)
                text = (
                    f"{progress.next_index - read:,} ratings of partition {partition} from {iso_ms(first_ms)} on have not been "
                    f"read, but windows of {spec.name} that they belong to are final"
                )
                report.findings.append(Finding("window", partition, read, None, text))


def _unread_of(report: AuditReport, replay: ShardReplay, read: int, engine: ExpectedWindows) -> None:
    """The same, of a shard whose records are broken on purpose: some of them are too late by design."""
    sent, mark = replay.progress.next_index, engine.watermark
    for spec in engine.specs:
        # a window that ended by then is final, and so is each that a rating from before it belongs to
        last_end_ms = mark.evict_ms - mark.evict_ms % spec.slide_ms
        count = replay.unread(read, sent, 0, last_end_ms, mark.moved_ms)
        if count:
            report.windows["wrong"] += 1
            text = (
                f"{count:,} ratings of partition {replay.partition} have not been read, but windows of {spec.name} that they "
                "belong to are final"
            )
            report.findings.append(Finding("window", replay.partition, read, None, text))
