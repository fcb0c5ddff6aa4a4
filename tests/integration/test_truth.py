"""The proof on real parts: a job that is right is verified, each known way to be wrong is caught and named, tampering is found."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import TopicPartition

from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.factory import open_delivery
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.kafka.client import make_admin, make_producer
from ray_pipeline.kafka.read import read_compacted, read_topic
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.metrics.verdicts import Verdicts
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_user_map
from ray_pipeline.truth.audit import KINDS
from ray_pipeline.truth.replay import ShardReplay, build_models
from ray_pipeline.verification import audit as audit_module
from ray_pipeline.verification.audit import audit
from ray_pipeline.verification.explain import Explainer
from ray_pipeline.verification.oracle import OracleStage
from ray_pipeline.windows import stage as stage_module
from ray_pipeline.windows.collector import Collector
from ray_pipeline.windows.spec import Panes
from ray_pipeline.windows.stage import WindowStage
from tests.conftest import command, wait_for

pytestmark = pytest.mark.timeout(300)

T0 = 1_700_000_040_000  # a full minute
PARTITIONS = 3
RATE = 60.0
SECONDS = 420
TOPICS = (
    "ratings",
    "metrics",
    "rejected",
    "outside",
    "progress",
    "control",
    "job",
    "batches",
    "expected",
    "predictions",
    "scores",
)
_numbers = itertools.count()


def world_settings(state_dir: Path, **changes: Any) -> Settings:
    """Settings with topics of their own."""
    prefix = f"truth-{next(_numbers)}"
    names = {f"{topic}_topic": f"{prefix}.{topic}" for topic in TOPICS}
    return load_settings(
        state_dir=state_dir,
        checkpoint=(state_dir / prefix).as_uri(),
        partitions=PARTITIONS,
        users=3_000,
        movies=300,
        actors=1,
        top_n=20,
        **names,
        **changes,
    )


@dataclass
class World:
    """A stream that was delivered, some of it late, and a job that is right."""

    settings: Settings
    broker: str
    replays: dict[int, ShardReplay]
    rounds: list[dict[int, int]]


def deliver(world: World, number: int) -> None:
    """The next round: a transaction a shard; committed one right after the other, to be in one micro-batch or two."""
    opened = {partition: open_delivery(world.settings, world.broker, partition) for partition in world.replays}
    for partition, replay in world.replays.items():
        first = world.rounds[number - 1].get(partition, 0) if number else 0
        until = world.rounds[number][partition]
        opened[partition].open(30)
        if until > first:
            opened[partition].send(replay.events(first, until - first))
    for partition, replay in world.replays.items():
        until = world.rounds[number][partition]
        event_ms = replay.due_ms(until - 1) if until else None
        progress = replay.progress
        opened[partition].commit(
            ShardProgress(
                progress.run,
                progress.config,
                partition,
                until,
                event_ms,
                T0 + number,
                progress.epochs,
                progress.share,
                progress.phase,
            )
        )
    for delivery in opened.values():
        delivery.close()


@pytest.fixture(scope="module")
def world(broker: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    settings = world_settings(tmp_path_factory.mktemp("world"))
    ensure_topics(settings, broker)
    return make_world(settings, broker)


def make_world(settings: Settings, broker: str) -> World:
    """A stream in which shard 2 lags behind."""
    catalogue, user_map = load_catalogue(settings), build_user_map(settings)
    models = build_models(settings, catalogue, range(PARTITIONS))
    replays = {
        p: ShardReplay(
            models[p],
            ShardProgress(
                "run",
                settings.digest(catalogue.digest),
                p,
                10**6,
                T0,
                T0,
                (Epoch(T0, RATE),),
                user_map.share(p),
                (p + 0.5) / PARTITIONS,
            ),
        )
        for p in range(PARTITIONS)
    }
    rounds = []
    # shard 2 lags behind the others: first within the watermark, so that nothing is late, then further
    for number, lag_ms in enumerate((45_000, 45_000, 45_000, 100_000, 140_000, 45_000, 0), 1):
        ends = dict.fromkeys(range(PARTITIONS), T0 + number * SECONDS * 1000 // 7)
        ends[2] -= lag_ms
        rounds.append({p: replays[p].count_before(ends[p]) for p in range(PARTITIONS)})
    return World(settings, broker, replays, rounds)


def publish_run(settings: Settings, broker: str) -> None:
    digest = load_catalogue(settings).digest
    record = {"run": "run", "config": settings.digest(digest), "catalogue": digest}
    record |= {"topic": settings.ratings_topic, "outside_topic": settings.outside_topic}
    put(broker, settings.progress_topic, "run", {**record, "settings": settings.event_settings(), "start_ms": T0})


def put(broker: str, topic: str, key: str, value: Any) -> None:
    producer = make_producer(broker)
    data = value if isinstance(value, bytes) or value is None else json.dumps(value, separators=(",", ":")).encode()
    producer.produce(topic, key=key.encode(), value=data)
    assert producer.flush(20) == 0


def run_job(world: World, settings: Settings) -> None:
    """Deliver the stream, window it, a micro-batch a round, and have the oracle judge it."""
    world = replace(world, settings=settings)
    publish_run(settings, world.broker)
    job = WindowStage(settings, world.broker, master="local[2]")
    job.start()
    oracle = OracleStage(settings, world.broker)
    try:
        for number in range(len(world.rounds)):
            deliver(world, number)
            assert job.drain(90)
        oracle.start()
        batch = job.status()["batch"]
        wait_for("the oracle", lambda: oracle.status()["batch"] == batch and oracle.status()["behind"] == 0)
    finally:
        oracle.stop()
        job.stop()


def verdicts_of(settings: Settings, broker: str) -> Verdicts:
    verdicts = Verdicts()
    for key, record in read_compacted(broker, settings.expected_topic).items():
        if key != "oracle":
            verdicts.expect(record)
    for record in read_compacted(broker, settings.metrics_topic).values():
        verdicts.actual(record)
    return verdicts


def later_ms() -> int:
    return time.time_ns() // 1_000_000 + 60_000


@pytest.fixture(scope="module")
def judged(world: World) -> World:
    """The world, with the windows of a job that is right."""
    run_job(world, world.settings)
    return world


def test_a_job_that_is_right_is_verified_late_ratings_included(judged: World) -> None:
    found = verdicts_of(judged.settings, judged.broker).tally(later_ms())
    assert found.wrong == 0, found.first_wrong
    assert found.verified >= 5 and found.late >= 1


def test_the_audit_agrees(judged: World) -> None:
    report = audit(judged.settings, judged.broker)
    assert (report.verdict, report.findings, report.reason) == ("agreed", [], "")
    total = sum(judged.rounds[-1].values())
    assert report.records == {"expected": total, "found": total, "outside": 0, **dict.fromkeys(KINDS, 0)}
    assert report.windows["checked"] >= 10 and report.windows["wrong"] == 0 and report.windows["late_dropped"] > 100


def test_the_audit_on_the_command_line_needs_the_brokers_alone(judged: World, tmp_path: Path) -> None:
    where = ("--bootstrap-servers", judged.broker, "--state-dir", tmp_path)
    run = ("--progress-topic", judged.settings.progress_topic)
    done = command("audit", "--json", *where, *run)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "agreed" and set(found) >= {"records", "windows", "findings", "partitions"}
    done = command("audit", *where, *run, "--from", "2023-11-14T22:15:00Z", "--to", "2023-11-14T22:17:00Z")
    assert done.returncode == 0 and "agreed" in done.stdout, done.stdout + done.stderr
    assert int(done.stdout.split(" expected")[0].rsplit(" ", 1)[1].replace(",", "")) == pytest.approx(
        120 * RATE, rel=0.01
    )
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,A (1990),Drama\n")
    other = command("audit", *where, *run, "--catalog", tmp_path / "movies.csv")
    assert other.returncode == 2 and "another catalogue" in other.stdout
    nothing = command("audit", *where, "--progress-topic", judged.settings.rejected_topic)
    assert nothing.returncode == 2 and "no record of a run" in nothing.stdout


def test_a_rating_is_explained_beside_its_record(judged: World) -> None:
    explainer = Explainer(judged.settings, judged.broker)
    found = explainer.by_index(1, 777)
    assert found["kafka"]["agrees"] and found["kafka"]["value"] == found["value"] and found["sent"]
    assert found["kafka"]["offset"] >= 777
    assert explainer.by_offset(1, found["kafka"]["offset"])["index"] == 777
    ahead = explainer.by_index(1, judged.rounds[-1][1] + 5)
    assert ahead["kafka"] is None and not ahead["sent"]


# -- each known way to be wrong


def first_ids_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Collector._top
    monkeypatch.setattr(
        Collector, "_top", lambda self, state: sorted(real(self, state), key=lambda m: m["movieId"])[:10]
    )


def five_minutes_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Panes.windows_of
    monkeypatch.setattr(
        Panes, "windows_of", lambda self, pane_ms: [w for w in real(self, pane_ms) if w[1] <= pane_ms + 180_000]
    )


def sliding_over_tumbling(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Collector.records

    def same_key(self: Collector, window: tuple[int, int], batch: int, now_ms: int) -> Any:
        tumbling, sliding = (spec.name for spec in self._specs)
        return [
            (key.replace(sliding, tumbling), {**record, "window_type": tumbling})
            for key, record in real(self, window, batch, now_ms)
        ]

    monkeypatch.setattr(Collector, "records", same_key)


def watermark_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage_module.aggregate
    monkeypatch.setattr(stage_module, "aggregate", lambda rows, specs, delay: real(rows, specs, 0))
    monkeypatch.setattr(stage_module, "Collector", lambda movies, specs, top, delay: Collector(movies, specs, top, 0))


def a_partition_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage_module.parse
    monkeypatch.setattr(stage_module, "parse", lambda raw, guard_ms: real(raw.where("partition <> 1"), guard_ms))


def rating_as_int(monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage_module.parse
    whole = "case when half is null then null else greatest(2, half - half % 2) end"
    monkeypatch.setattr(
        stage_module,
        "parse",
        lambda raw, guard_ms: (
            real(raw, guard_ms).selectExpr("*", f"{whole} as w").drop("half").withColumnRenamed("w", "half")
        ),
    )


@pytest.mark.parametrize(
    ("defect", "named"),
    [
        (first_ids_seen, "movie 1 is"),
        (five_minutes_of_three, "it spans 180 s instead of 300 s"),
        (sliding_over_tumbling, "it holds what sliding_5min_1min must hold"),
        (watermark_of_zero, "dropped that were not too late"),
        (a_partition_skipped, "of partition 1 that belong to it have not been read"),
        (rating_as_int, "ratings were read as whole numbers"),
    ],
)
def test_a_defect_of_old_is_caught_and_named(
    judged: World,
    defect: Callable[[pytest.MonkeyPatch], None],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    settings = world_settings(tmp_path)
    ensure_topics(settings, judged.broker)
    defect(monkeypatch)
    run_job(judged, settings)
    monkeypatch.setattr(audit_module, "_NEXT_BATCH_S", 1.0)  # no job goes on that would read what it has not
    verdicts = verdicts_of(settings, judged.broker)
    found = verdicts.tally(later_ms())
    assert found.wrong >= 1
    reasons = [row["reason"] for row in verdicts.wrong(later_ms(), most=1000)]
    assert any(named in reason for reason in reasons), reasons
    report = audit(settings, judged.broker)
    assert report.verdict == "disagreed" and report.windows["wrong"] >= 1
    assert all(report.records[kind] == 0 for kind in KINDS)


# -- tampering with topics


@dataclass
class Copy:
    """A copy of the world's topics, to tamper with."""

    settings: Settings
    records: dict[int, list[tuple[str | None, bytes | None]]]


@pytest.fixture
def copied(judged: World, tmp_path: Path) -> Iterator[Callable[[Callable[[Copy], None]], Settings]]:
    source = judged.settings
    by_partition: dict[int, list[tuple[str | None, bytes | None]]] = {p: [] for p in range(PARTITIONS)}
    for record in read_topic(judged.broker, source.ratings_topic):
        by_partition[record.partition].append((record.key, record.value))

    def make(tamper: Callable[[Copy], None]) -> Settings:
        copy = Copy(world_settings(tmp_path), {p: list(rows) for p, rows in by_partition.items()})
        ensure_topics(copy.settings, judged.broker)
        tamper(copy)
        producer = make_producer(judged.broker)
        for partition, rows in copy.records.items():
            for key, value in rows:
                producer.produce(copy.settings.ratings_topic, key=key, value=value, partition=partition)
        for name in ("metrics_topic", "batches_topic", "progress_topic"):
            for record in read_topic(judged.broker, getattr(source, name)):
                producer.produce(getattr(copy.settings, name), key=record.key, value=record.value)
        assert producer.flush(30) == 0
        return copy.settings

    yield make


def altered(value: bytes | None, **fields: Any) -> bytes:
    return json.dumps({**json.loads(value or b""), **fields}, separators=(",", ":")).encode()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_exactly_what_was_tampered_with_in_the_ratings_is_found(
    judged: World, copied: Callable[[Callable[[Copy], None]], Settings], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    must: dict[str, int] = dict.fromkeys(KINDS, 0)

    def tamper(copy: Copy) -> None:
        for partition, rows in copy.records.items():
            slots = rng.permutation(len(rows) // 100 - 1)[:8]
            # from the end, so that places before stay where they are
            for place in sorted(slots.tolist(), reverse=True):
                at = 100 * place + 50
                kind = str(rng.choice(["missing", "repeated", "altered", "out_of_order", "foreign"]))
                must[kind] += 1
                key, value = rows[at]
                if kind == "missing":
                    del rows[at]
                elif kind == "repeated":
                    rows.insert(at + 1, rows[at - int(rng.integers(1, 40))])
                elif kind == "altered":
                    rows[at] = (key, altered(value, rating=0.5 if json.loads(value or b"")["rating"] != 0.5 else 5.0))
                elif kind == "out_of_order":
                    rows[at], rows[at + 1] = rows[at + 1], rows[at]
                else:
                    rows.insert(at, ("4", b'{"userId":4,"movieId":1,"rating":3.0,"timestamp":1700000100000}'))
            del partition

    settings = copied(tamper)
    report = audit(settings, judged.broker, processes=1)
    assert report.verdict == "disagreed"
    assert {kind: report.records[kind] for kind in KINDS} == must
    for kind in KINDS:
        listed = [f for f in report.findings if f.kind == kind]
        assert len(listed) == must[kind] and all(f.offset is not None and f.partition is not None for f in listed)
    assert report.windows["wrong"] == 0  # the windows are those of the ratings as they were


def test_records_that_were_deleted_at_the_head_are_missing(
    judged: World, copied: Callable[[Callable[[Copy], None]], Settings]
) -> None:
    settings = copied(lambda copy: None)
    place = TopicPartition(settings.ratings_topic, 1, 123)
    admin = make_admin(judged.broker)  # its futures live as long as it does
    admin.delete_records([place])[place].result(20)
    report = audit(settings, judged.broker, processes=1)
    assert (report.verdict, report.records["missing"]) == ("disagreed", 123)
    finding = next(f for f in report.findings if f.kind == "missing")
    assert (finding.partition, finding.index, finding.offset) == (1, 0, 123) and "0 to 122" in finding.detail


def test_a_lost_tail_and_ratings_nobody_owns_up_to_are_found(
    judged: World, copied: Callable[[Callable[[Copy], None]], Settings]
) -> None:
    def tamper(copy: Copy) -> None:
        del copy.records[0][-9:]
        replay = judged.replays[2]
        from ray_pipeline.codec import encode_keys, encode_values

        more = replay.events(judged.rounds[-1][2], 4)
        copy.records[2] += [(k.decode(), v) for k, v in zip(encode_keys(more), encode_values(more), strict=True)]

    report = audit(copied(tamper), judged.broker, processes=1)
    assert (report.records["missing"], report.records["beyond"]) == (9, 4)


def newest_progress(settings: Settings, broker: str, partition: int) -> dict[str, Any]:
    return read_compacted(broker, settings.progress_topic)[f"shard/{partition}"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"next_index": 5}, "is due at"),
        ({"config": "0000"}, "its configuration is 0000"),
        ({"share": 0.9}, "its share is 0.9"),
        ({"epochs": []}, "at least one epoch"),
        ({"next_index": "7"}, "next_index is '7'"),
    ],
)
def test_a_forged_progress_record_is_named_and_the_true_one_used(
    judged: World, copied: Callable[[Callable[[Copy], None]], Settings], changes: dict[str, Any], said: str
) -> None:
    settings = copied(lambda copy: None)
    true = newest_progress(settings, judged.broker, 1)
    put(judged.broker, settings.progress_topic, "shard/1", {**true, **changes})
    report = audit(settings, judged.broker, processes=1)
    assert report.verdict == "disagreed" and not any(report.records[kind] for kind in KINDS)
    assert [(f.kind, f.partition) for f in report.findings] == [("progress", 1)] and said in report.findings[0].detail


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("total", {"count": 1}, "holds 1 ratings"),
        ("total", {"avg_rating": 4.9}, "the mean is 4.9"),
        ("topn", {"movies": []}, "0 movie rows"),
        ("genres", {"genres": []}, "0 genre rows"),
        ("total", None, "there is no total record"),
        ("topn", b"rubbish", "no JSON object"),
    ],
)
def test_an_altered_or_deleted_metrics_record_is_named(
    judged: World,
    copied: Callable[[Callable[[Copy], None]], Settings],
    kind: str,
    change: dict[str, Any] | bytes | None,
    said: str,
) -> None:
    settings = copied(lambda copy: None)
    records = read_compacted(judged.broker, settings.metrics_topic)
    key = sorted(key for key in records if key.startswith("tumbling") and key.endswith(kind))[2]
    value = {**records[key], **change} if isinstance(change, dict) else change
    put(judged.broker, settings.metrics_topic, key, value)
    report = audit(settings, judged.broker, processes=1)
    assert (report.verdict, report.windows["wrong"], len(report.findings)) == ("disagreed", 1, 1)
    assert said in report.findings[0].detail and key.split("|")[1] in report.findings[0].detail
