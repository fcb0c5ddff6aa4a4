"""What anybody may have written into a run's topics: audit and oracle name it, and never stumble over it."""

from __future__ import annotations

import copy
import json
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ray_pipeline.clock import FakeClock, SystemClock
from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.errors import RayPipelineError, RecordError
from ray_pipeline.generator.plan import ShardSchedule
from ray_pipeline.kafka import read as read_module
from ray_pipeline.kafka.read import Record
from ray_pipeline.metrics.verdicts import Verdicts
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_user_map
from ray_pipeline.truth.oracle import Settled
from ray_pipeline.truth.outside import OutsideRatings
from ray_pipeline.truth.replay import ShardReplay, build_models
from ray_pipeline.truth.windows import Cut, CutLog, ExpectedWindows
from ray_pipeline.verification import answers as answers_module
from ray_pipeline.verification import audit as audit_module
from ray_pipeline.verification import oracle as oracle_module
from ray_pipeline.verification import scoring as scoring_module
from ray_pipeline.verification.answers import AnswerFeed
from ray_pipeline.verification.audit import AuditReport, audit
from ray_pipeline.verification.oracle import OracleStage
from ray_pipeline.verification.scoring import ScoreFeed
from ray_pipeline.windows.spec import epoch_ms, iso_ms, window_specs

START_MS = 1_700_000_040_000
SETTINGS = load_settings(
    users=300, movies=120, partitions=2, actors=1, tumbling_s=10, sliding_s=30, slide_s=10, top_n=7, watermark_s=5
)
CATALOGUE = load_catalogue(SETTINGS)
MODELS = build_models(SETTINGS, CATALOGUE, range(2))
EPOCHS = (Epoch(START_MS, 30.0), Epoch(START_MS + 30_000, 60.0))
SPECS = window_specs(SETTINGS)
BATCHES = 12
ANYBODY = load_settings()


def progress_of(partition: int, sent: int) -> ShardProgress:
    share, phase = build_user_map(SETTINGS).share(partition), (partition + 0.5) / 2
    config = SETTINGS.digest(CATALOGUE.digest)
    found = ShardProgress("run", config, partition, sent, None, START_MS, EPOCHS, share, phase)
    return replace(found, event_time_ms=int(ShardSchedule.lived(found).due_ms(sent - 1, 1)[0]))


@dataclass
class Topics:
    """Topics in memory, in place of a broker's."""

    records: dict[str, list[Record]] = field(default_factory=dict)

    def put(self, topic: str, key: str, value: Any) -> None:
        """Append a record: bytes as they are, None as a deletion, anything else as JSON."""
        data = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
        rows = self.records.setdefault(topic, [])
        rows.append(Record(topic, 0, len(rows), key, data, START_MS))

    def of(self, topic: str) -> list[Record]:
        return self.records.get(topic, [])

    def newest(self, topic: str, key: str) -> Any:
        return json.loads([r for r in self.of(topic) if r.key == key][-1].value or b"")

    def keep_newest(self, topic: str) -> None:
        """What compaction leaves."""
        newest = {r.key: r for r in self.of(topic)}
        self.records[topic] = sorted(newest.values(), key=lambda r: r.offset)


def metrics_of(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A window's records as a job that is right writes them."""
    head = {n: record[n] for n in ("window_start", "window_end", "window_type", "count", "avg_rating", "batch")}
    views = {
        "total": {n: record[n] for n in ("p50", "p95", "histogram")},
        "topn": {"movies": record["movies"]},
        "genres": {"genres": record["genres"]},
    }
    for view, fields in views.items():
        yield (
            f"{record['window_type']}|{record['window_start']}|{view}",
            {**head, "kind": view, **fields, "updated_ms": 1},
        )


def windows_of(settings: Settings) -> dict[str, Any]:
    """Record ``windows``, as a job writes it."""
    return {
        n: getattr(settings, n) for n in ("tumbling_s", "sliding_s", "slide_s", "watermark_s", "top_n", "max_ahead_s")
    }


def job(
    topics: Topics,
    settings: Settings,
    reads: list[dict[int, int]],
    replays: dict[int, ShardReplay],
    says_windows: bool = True,
    at_ms: int = START_MS,
) -> ExpectedWindows:
    """A query that is right, from its first micro-batch on."""
    engine = ExpectedWindows(CATALOGUE, window_specs(settings), round(settings.watermark_s * 1000), settings.top_n)
    for batch, read in enumerate(reads):
        engine.advance(Cut(batch, read), replays)
        for window in engine.changed():
            if window in engine.open:
                for key, record in metrics_of(engine.record(window)):
                    topics.put(SETTINGS.metrics_topic, key, record)
        partitions = {str(p): {"valid": n, "next_offset": n} for p, n in read.items()}
        said = {"windows": windows_of(settings)} if says_windows and batch == 0 else {}
        cut = {"batch": batch, "at_ms": at_ms + batch, "partitions": partitions, **said}
        topics.put(SETTINGS.batches_topic, str(batch), cut)
        engine.close()
    return engine


def made_world() -> Topics:
    """A run of two shards of which one lags, so that ratings come too late, and a job that is right."""
    topics = Topics()
    run = {"run": "run", "config": SETTINGS.digest(CATALOGUE.digest), "catalogue": CATALOGUE.digest}
    topics.put(SETTINGS.progress_topic, "run", {**run, "settings": SETTINGS.event_settings()})
    topics.put(SETTINGS.progress_topic, "windows", windows_of(SETTINGS))
    replays = {p: ShardReplay(MODELS[p], progress_of(p, 10_000)) for p in range(2)}
    ends = [START_MS + 6_000 * n for n in range(1, BATCHES + 1)]
    reads = [
        {0: replays[0].count_before(e), 1: replays[1].count_before(e - (25_000 if 3 < n < 8 else 0))}
        for n, e in enumerate(ends)
    ]
    for read in reads:
        for p, sent in read.items():
            topics.put(SETTINGS.progress_topic, f"shard/{p}", progress_of(p, sent).to_json())
    engine = job(topics, SETTINGS, reads, replays)
    for p, sent in reads[-1].items():
        events = replays[p].events(0, sent)
        for key, value in zip(encode_keys(events), encode_values(events), strict=True):
            topics.put(f"{SETTINGS.ratings_topic}/{p}", key.decode(), value)
    assert engine.late_total[0] > 50
    return topics


WORLD = made_world()


class NobodyOutside:
    """Topic ``ratings.outside``, empty."""

    def __init__(self, *_: Any) -> None:
        self.ratings = OutsideRatings()

    def refresh(self) -> OutsideRatings:
        return self.ratings

    def close(self) -> None:
        pass


def audited(topics: Topics, settings: Settings = ANYBODY, **span: int) -> AuditReport:
    """The audit of topics in memory, as `ray-pipeline audit` prints it."""

    def blocks(found: Settings, _: str, partition: int, *__: Any) -> Iterator[Any]:
        rows = topics.of(f"{found.ratings_topic}/{partition}")
        yield [r.key and r.key.encode() for r in rows], [r.value for r in rows], [r.offset for r in rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_module, "read_topic", lambda _, topic: iter(topics.of(topic)))
        patch.setattr(
            audit_module, "read_topic_from", lambda _, topic, __, at: (r for r in topics.of(topic) if r.offset >= at)
        )
        patch.setattr(
            audit_module,
            "newest_of_key",
            lambda _, topic, key, __: next((r.value for r in reversed(topics.of(topic)) if r.key == key), None),
        )
        patch.setattr(audit_module, "_NEXT_BATCH_S", 0.2)
        patch.setattr(audit_module, "_LOOK_AGAIN_S", 0.0)
        there = {
            topic.removesuffix("/0"): 2 if topic.endswith("/0") else 1 for topic, rows in topics.records.items() if rows
        }
        patch.setattr(audit_module, "partitions_of", lambda _, names: {n: there[n] for n in names if n in there})
        patch.setattr(audit_module, "_blocks", blocks)
        patch.setattr(audit_module, "OutsideLedger", NobodyOutside)
        report = audit(settings, "nowhere", processes=1, **span)
    json.dumps(report.as_dict(), allow_nan=False)
    return report


def tampered() -> Topics:
    return Topics({topic: list(rows) for topic, rows in WORLD.records.items()})


def test_windows_that_could_not_be_compared_are_unchecked_unless_no_job_ran() -> None:
    def without(*topics: str, windows: bool = True, batch: int | None = None) -> AuditReport:
        found = tampered()
        for topic in topics:
            found.records[topic] = []
        if not windows:
            found.records[SETTINGS.progress_topic] = [
                r for r in found.of(SETTINGS.progress_topic) if r.key != "windows"
            ]
        if batch is not None:
            found.put(SETTINGS.job_topic, "job", {"state": "running", "batch": batch})
        return audited(found)

    written = (SETTINGS.metrics_topic, SETTINGS.batches_topic)
    lost = without(windows=False)
    assert lost.verdict == "unchecked" and "no job has published" in lost.reason and "topic metrics " in lost.reason
    emptied = without(*written, batch=11)
    assert emptied.verdict == "unchecked" and "topic metrics.progress " in emptied.reason
    assert without(*written, batch=-1).verdict == "agreed"  # it has read nothing so far
    assert without(*written, windows=False).verdict == "agreed"  # a generator alone


def test_a_query_with_a_fresh_checkpoint_is_another_one_however_much_its_first_micro_batch_reads() -> None:
    topics = tampered()
    replays = {p: ShardReplay(MODELS[p], progress_of(p, 10_000)) for p in range(2)}
    engine = ExpectedWindows(CATALOGUE, window_specs(SETTINGS), 5_000, SETTINGS.top_n)
    last = topics.newest(SETTINGS.batches_topic, str(BATCHES - 1))
    engine.advance(Cut(0, {int(p): of["valid"] for p, of in last["partitions"].items()}), replays)
    for window in engine.changed():
        for key, record in metrics_of(engine.record(window)):
            topics.put(SETTINGS.metrics_topic, key, record)
    topics.put(SETTINGS.batches_topic, "0", {**last, "batch": 0})
    assert engine.late_total[0] == 0 != audited(tampered()).windows["late_dropped"]
    report = audited(topics)
    assert (report.verdict, report.windows["late_dropped"]) == ("agreed", 0)
    stage, _ = followed(topics)
    assert stage.status()["batch"] == 0


def test_topics_that_nobody_touched_agree() -> None:
    report = audited(WORLD)
    assert (report.verdict, report.reason, report.findings) == ("agreed", "", [])
    assert report.windows["checked"] > 10 and report.windows["late_dropped"] > 50


# -- a run that goes on


class GoingOn(Topics):
    """Topics of which one grows: it is longer each time that it is looked at."""

    growing = ""
    lengths: tuple[int, ...] = ()

    def of(self, topic: str) -> list[Record]:
        rows = super().of(topic)
        if topic != self.growing:
            return rows
        length, self.lengths = self.lengths[0], self.lengths[1:] or self.lengths
        return rows[:length]


@pytest.mark.parametrize(("looks", "verdict"), [((8, 8, 8, 9), "agreed"), ((8, 9), "agreed"), ((8,), "disagreed")])
def test_what_was_sent_too_late_for_final_windows_may_wait_for_the_next_micro_batch(
    looks: tuple[int, ...], verdict: str
) -> None:
    topics = GoingOn({topic: list(rows) for topic, rows in WORLD.records.items()})
    topics.growing, topics.lengths = SETTINGS.batches_topic, looks
    # shard 1 was behind by more than the watermark up to micro-batch 7, and has just sent what micro-batch 8 reads
    sent = json.loads(WORLD.of(SETTINGS.batches_topic)[8].value or b"")["partitions"]
    topics.records[SETTINGS.metrics_topic] = [
        r for r in WORLD.of(SETTINGS.metrics_topic) if json.loads(r.value or b"")["batch"] < 8
    ]
    for p, of in sent.items():
        topics.records[f"{SETTINGS.ratings_topic}/{p}"] = WORLD.of(f"{SETTINGS.ratings_topic}/{p}")[: of["valid"]]
        topics.put(SETTINGS.progress_topic, f"shard/{p}", progress_of(int(p), of["valid"]).to_json())
    report = audited(topics)
    assert report.verdict == verdict and report.windows["checked"] > 10
    assert all("of partition 1" in f.detail and "have not been read" in f.detail for f in report.findings)
    assert bool(report.findings) == bool(report.windows["wrong"]) == (verdict == "disagreed")


def test_a_shard_that_begins_while_its_partition_is_read_is_no_stranger() -> None:
    topics = GoingOn({topic: list(rows) for topic, rows in WORLD.records.items()})
    rows = topics.of(SETTINGS.progress_topic)
    rows.sort(key=lambda r: r.key == "shard/1")
    topics.records[SETTINGS.progress_topic] = [replace(r, offset=n) for n, r in enumerate(rows)]
    before = sum(r.key != "shard/1" for r in rows)
    topics.growing, topics.lengths = SETTINGS.progress_topic, (before, len(rows))
    report = audited(topics)
    assert (report.verdict, report.findings) == ("agreed", [])
    assert report.partitions["1"]["found"] == len(WORLD.of(f"{SETTINGS.ratings_topic}/1"))
    topics.lengths = (before,)
    never = audited(topics)
    assert never.verdict == "disagreed" and never.partitions["1"]["foreign"] == never.partitions["1"]["found"]


# -- where it is


def test_it_is_read_where_the_run_says_that_its_topics_are_unless_they_are_named() -> None:
    topics = tampered()
    names = {name: f"its.{name}" for name in ("ratings/0", "ratings/1", "metrics", "metrics.batches")}
    for old, new in names.items():
        topics.records[new] = topics.records.pop(old)
    for p in range(2):
        topics.put(f"{ANYBODY.ratings_topic}/{p}", "7", b"of another run")
    topics.put(ANYBODY.metrics_topic, "x", b"of another run")
    assert audited(topics).verdict == "disagreed"  # a run from before has not said it: the settings count
    said = {
        "run": {"topic": "its.ratings", "outside_topic": "its.outside"},
        "windows": {"metrics_topic": "its.metrics", "batches_topic": "its.metrics.batches"},
    }
    for key, more in said.items():
        topics.put(ANYBODY.progress_topic, key, {**WORLD.newest(ANYBODY.progress_topic, key), **more})
    found = audited(topics)
    assert (found.verdict, found.findings) == ("agreed", []) and found.windows["checked"] > 10
    assert audited(topics, load_settings(ratings_topic=ANYBODY.ratings_topic)).records["missing"] > 0
    assert audited(topics, load_settings(metrics_topic=ANYBODY.metrics_topic)).windows["wrong"] > 0


# -- progress


PROGRESS: list[tuple[str, Any, str]] = [
    ("shard/x", {}, "shard/x"),
    ("shard/5", progress_of(1, 5).to_json(), "shard/5"),
    ("shard/1", [1], "no JSON object"),
    ("shard/1", b"\xff{", "no JSON object"),
    ("shard/1", None, "no JSON object"),
    ("shard/1", {"next_index": "7"}, "next_index is '7'"),
    ("shard/1", {"event_time_ms": "x"}, "event_time_ms is 'x'"),
    ("shard/1", {"event_time_ms": 10**20}, "event_time_ms"),
    ("shard/1", {"next_index": 10**15}, "its own plan has"),
    ("shard/1", {"epochs": [{"from_ms": 10**30, "rate": 1.0}]}, "from_ms"),
    ("shard/1", {"partition": 0}, "it is of partition 0"),
    ("run", {"run": None}, "run is missing"),
    ("run", {"settings": {}}, "of configuration"),
    ("run", {"topic": 5}, "topic is 5"),
    ("run", {"outside_topic": []}, "outside_topic is []"),
    ("run", b"rubbish", "it has no settings"),
    ("run", [], "it has no settings"),
    ("windows", [], "no JSON object"),
    ("windows", {"tumbling_s": None}, "tumbling_s is missing"),
    ("windows", {"slide_s": 0}, "slide_s is 0"),
    ("windows", {"batches_topic": 1}, "batches_topic is 1"),
]


@pytest.mark.parametrize(("key", "value", "said"), PROGRESS, ids=[f"{k} {said}" for k, _, said in PROGRESS])
def test_a_progress_record_that_nobody_of_the_run_wrote_is_named_and_the_true_one_used(
    key: str, value: Any, said: str
) -> None:
    topics = tampered()
    if isinstance(value, dict) and key != "shard/x":
        value = {**topics.newest(SETTINGS.progress_topic, key), **value}
    topics.put(SETTINGS.progress_topic, key, value)
    report = audited(topics)
    assert report.verdict == "disagreed" and [f.kind for f in report.findings] == ["progress"]
    assert said in report.findings[0].detail and key in report.findings[0].detail
    assert report.windows["wrong"] == 0 and not any(row["foreign"] for row in report.partitions.values())


def test_many_forged_progress_records_do_not_hide_the_true_one() -> None:
    topics = tampered()
    for n in range(25):
        topics.put(
            SETTINGS.progress_topic, "shard/1", {**topics.newest(SETTINGS.progress_topic, "shard/1"), "next_index": n}
        )
    report = audited(topics)
    assert {f.kind for f in report.findings} == {"progress"} and len(report.findings) == 20
    assert report.records["foreign"] == 0 and set(report.partitions) == {"0", "1"}
    topics.keep_newest(SETTINGS.progress_topic)  # and now it is gone
    report = audited(topics)
    assert report.verdict == "disagreed" and {f.kind for f in report.findings} == {"progress"}
    assert "partition 1: no record shard/1" in report.reason and set(report.partitions) == {"0"}
    assert "shard/1" in report.windows["reason"] and report.windows["wrong"] == 0


def test_without_a_record_of_a_run_nothing_can_be_checked_and_it_is_said_why() -> None:
    topics = tampered()
    topics.records[SETTINGS.progress_topic] = [r for r in topics.of(SETTINGS.progress_topic) if r.key != "run"]
    topics.put(SETTINGS.progress_topic, "run", {})
    report = audited(topics)
    assert report.verdict == "unchecked" and "it has no settings" in report.reason


# -- windows


def key_of(view: str) -> str:
    """Of the first tumbling window."""
    return next(
        r.key
        for r in WORLD.of(SETTINGS.metrics_topic)
        if r.key and r.key.startswith("tumbling") and r.key.endswith(view)
    )


METRICS: list[tuple[str, Any, str]] = [
    ("total", b"no JSON", "no JSON object"),
    ("total", [], "no JSON object"),
    ("total", {"count": "many"}, "count is 'many'"),
    ("total", {"histogram": None}, "histogram is None"),
    ("topn", {"movies": [3]}, "movies is [3]"),
    ("topn", {"count": 1}, "count of its topn record is 1"),
    ("topn", {"kind": "total"}, "kind is total"),
    ("genres", {"genres": [{"genre": 4}]}, "genre is 4"),
    ("genres", {"window_start": "2020-01-01T00:00:00.000Z"}, "window_start of its genres record"),
    ("total", None, "there is no total record"),
    ("topn", None, "(deleted: topn at offset"),
]


@pytest.mark.parametrize(("view", "value", "said"), METRICS, ids=[f"{view} {said}" for view, _, said in METRICS])
def test_a_window_that_was_altered_or_deleted_is_wrong_and_named(view: str, value: Any, said: str) -> None:
    topics, key = tampered(), key_of(view)
    if isinstance(value, dict):
        value = {**topics.newest(SETTINGS.metrics_topic, key), **value}
    topics.put(SETTINGS.metrics_topic, key, value)
    report = audited(topics)
    assert (report.verdict, report.windows["wrong"], len(report.findings)) == ("disagreed", 1, 1)
    assert said in report.findings[0].detail and key.split("|")[1] in report.findings[0].detail


@pytest.mark.parametrize(
    "key", ["", "hello", "a|b|total", "tumbling_10s|never|total", "tumbling_10s|2023-11-14T22:14:00.000Z|sum"]
)
def test_a_record_under_a_key_that_the_job_does_not_have_is_wrong(key: str) -> None:
    topics = tampered()
    topics.put(SETTINGS.metrics_topic, key, b"\x00")
    report = audited(topics)
    assert (report.verdict, report.windows["wrong"]) == ("disagreed", 1)
    assert f"offset {topics.of(SETTINGS.metrics_topic)[-1].offset}" in report.findings[0].detail


def test_an_open_window_does_not_pass_as_pending_by_naming_a_micro_batch_that_nobody_ran() -> None:
    key = [r.key or "" for r in WORLD.of(SETTINGS.metrics_topic)][-3]
    for batch, wrong in ((BATCHES + 5, 1), (BATCHES, 0)):  # the job may be within the next one
        topics = tampered()
        topics.put(
            SETTINGS.metrics_topic, key, {**topics.newest(SETTINGS.metrics_topic, key), "count": 3, "batch": batch}
        )
        report = audited(topics)
        assert (report.windows["wrong"], report.windows["pending"]) == (wrong, 1 - wrong)


def test_a_wrong_window_says_how_many_ratings_were_dropped_wrongly() -> None:
    topics = tampered()
    totals = {
        r.key: json.loads(r.value or b"")
        for r in topics.of(SETTINGS.metrics_topic)
        if r.key and r.key.endswith("total")
    }
    key, record = next((k, t) for k, t in totals.items() if k.startswith("tumbling") and t["count"] > 50)
    fullest = max(range(10), key=record["histogram"].__getitem__)
    record["histogram"][fullest] -= 7
    topics.put(SETTINGS.metrics_topic, key, {**record, "count": record["count"] - 7})
    detail = audited(topics).findings[0].detail
    assert "7 too few" in detail and "7 ratings were dropped that were not too late" in detail


@pytest.mark.parametrize(
    "value", [b"x", [], {"batch": 1}, {"batch": "1", "partitions": {}}, {"batch": 30, "partitions": {"0": {}}}]
)
def test_what_no_micro_batch_wrote_is_named(value: Any) -> None:
    topics = tampered()
    topics.put(SETTINGS.batches_topic, "30", value)
    report = audited(topics)
    assert (
        report.verdict == "disagreed"
        and f"offset {BATCHES} of topic {SETTINGS.batches_topic}" in report.findings[0].detail
    )


# -- anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def altered(data: st.DataObject, record: dict[str, Any], kept: tuple[str, ...] = (), inner: bool = False) -> Any:
    """A record with a field lost or changed, or something else altogether."""
    how = data.draw(
        st.sampled_from(["field", "lost", "value"] if inner else ["field", "field", "lost", "inner", "value", "bytes"])
    )
    if how == "value":
        return data.draw(JSON)
    if how == "bytes":
        return data.draw(st.binary(max_size=20) | st.none())
    record = copy.deepcopy(record)
    name = data.draw(st.sampled_from([name for name in record if name not in kept]))
    rows = record[name]
    if how == "lost":
        del record[name]
    elif how == "inner" and isinstance(rows, list) and rows:
        at = data.draw(st.integers(0, len(rows) - 1))
        rows[at] = altered(data, rows[at], inner=True) if isinstance(rows[at], dict) else data.draw(JSON)
    else:
        record[name] = data.draw(JSON)
    return record


@hypothesis_settings(max_examples=120)
@given(st.data())
def test_no_progress_record_makes_the_audit_stumble(data: st.DataObject) -> None:
    topics = tampered()
    key = data.draw(st.sampled_from(["run", "windows", "shard/0", "shard/1", "shard/2", "shard/-1", "shard/"]))
    true = topics.newest(SETTINGS.progress_topic, key if key in ("run", "windows", "shard/0") else "shard/1")
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 21]))):
        topics.put(SETTINGS.progress_topic, key, altered(data, true))
    if data.draw(st.booleans()):
        topics.keep_newest(SETTINGS.progress_topic)
    report = audited(topics)
    assert report.verdict in ("agreed", "disagreed", "unchecked") and bool(report.reason) >= (
        report.verdict == "unchecked"
    )


@hypothesis_settings(max_examples=150)
@given(st.data())
def test_an_altered_window_record_never_agrees(data: st.DataObject) -> None:
    topics = tampered()
    key = data.draw(st.sampled_from(sorted({r.key or "" for r in topics.of(SETTINGS.metrics_topic)})))
    true = topics.newest(SETTINGS.metrics_topic, key)
    # when it was written, and in which micro-batch, is no content of the window
    found = altered(data, true, kept=("batch", "updated_ms"))
    assume(found != true)
    topics.put(SETTINGS.metrics_topic, key, found)
    report = audited(topics)
    assert report.verdict == "disagreed" and report.windows["wrong"] == 1, found


@hypothesis_settings(max_examples=60)
@given(st.data())
def test_no_micro_batch_record_makes_the_audit_stumble(data: st.DataObject) -> None:
    topics = tampered()
    true = topics.newest(SETTINGS.batches_topic, "5")
    topics.put(SETTINGS.batches_topic, "5", altered(data, data.draw(st.sampled_from([true, true["partitions"]]))))
    assert audited(topics).verdict in ("agreed", "disagreed")


# -- the oracle


class Published:
    """A producer that keeps what it is given."""

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}
        self.log: list[tuple[str, Any]] = []

    def produce(self, _: str, key: bytes, value: bytes) -> None:
        self.log.append((key.decode(), json.loads(value)))
        self.records[key.decode()] = json.loads(value)

    def poll(self, _: float) -> int:
        return 0

    def flush(self, _: float) -> int:
        return 0


def followed(topics: Topics, before: Topics | None = None, producer: Any = None) -> tuple[OracleStage, dict[str, Any]]:
    """An oracle that has followed topics to their end, and what it has published; ``before`` is what predecessors had."""
    producer, read = producer or Published(), threading.Event()

    def follow(_: str, names: list[str], __: bool, end: threading.Event) -> Iterator[list[Record]]:
        yield [record for name in names for record in topics.of(name)]
        read.set()
        end.wait(30)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle_module, "follow", follow)
        patch.setattr(oracle_module, "read_topic", lambda _, topic: iter((before or Topics()).of(topic)))
        patch.setattr(oracle_module, "make_producer", lambda *_, **__: producer)
        patch.setattr(oracle_module, "OutsideLedger", NobodyOutside)
        stage = OracleStage(ANYBODY, "nowhere")
        stage.start()
        assert read.wait(30)
        stage.stop()
    return stage, producer.records


# -- another query with other windows: the former one's stay in the topic

OTHER = SETTINGS.model_copy(update={"tumbling_s": 20})
OLD_WINDOW = f"tumbling_10s|{iso_ms(START_MS + 10_000)}"


def with_other_windows(says_windows: bool = True, batches: int = 3) -> Topics:
    """The run's topics after its job was started with another window length and another checkpoint."""
    found = tampered()
    if not says_windows:  # as a job wrote them that did not say yet what its windows are
        rows = found.records.pop(SETTINGS.batches_topic)
        for row in rows:
            said = json.loads(row.value or b"")
            said.pop("windows", None)
            found.put(SETTINGS.batches_topic, row.key or "", said)
    sent = {p: int(found.newest(SETTINGS.progress_topic, f"shard/{p}")["next_index"]) for p in range(2)}
    reads = [{p: n * part // batches for p, n in sent.items()} for part in range(1, batches + 1)]
    replays = {p: ShardReplay(MODELS[p], progress_of(p, n)) for p, n in sent.items()}
    found.put(SETTINGS.progress_topic, "windows", windows_of(OTHER))
    found.keep_newest(SETTINGS.progress_topic)
    job(found, OTHER, reads, replays)
    return found


def windows_there(topics: Topics) -> set[str]:
    return {(r.key or "").rpartition("|")[0] for r in topics.of(SETTINGS.metrics_topic)}


def test_windows_of_a_former_length_are_judged_as_what_they_were() -> None:
    topics = with_other_windows()
    report = audited(topics)
    assert (report.verdict, report.reason, report.findings) == ("agreed", "", [])
    there = windows_there(topics)
    assert {w.partition("|")[0] for w in there} == {"tumbling_10s", "tumbling_20s", "sliding_30s_10s"}
    counts = {"checked": len(there), "wrong": 0, "pending": 0, "other_definition": 0}
    assert {name: report.windows[name] for name in counts} == counts


def test_windows_that_a_new_query_has_not_come_to_are_the_former_ones() -> None:
    topics = with_other_windows()
    rows = topics.of(SETTINGS.batches_topic)
    assert json.loads(rows[BATCHES].value or b"")["batch"] == 0
    del rows[BATCHES:]  # it has said what its windows are, and read nothing yet
    topics.records[SETTINGS.metrics_topic] = list(WORLD.of(SETTINGS.metrics_topic))
    assert audited(topics).verdict == "agreed"


@pytest.mark.parametrize(
    ("window", "change"),
    [
        (OLD_WINDOW, {"count": 1}),
        (OLD_WINDOW, None),
        (f"tumbling_20s|{iso_ms(START_MS)}", {"count": 1}),
        (f"sliding_30s_10s|{iso_ms(START_MS)}", {"count": 1}),
        (f"tumbling_10s|{iso_ms(START_MS + 10_000_000)}", {}),  # a former length, a time without ratings
        (f"tumbling_7s|{iso_ms(START_MS + 7_000)}", {}),  # a length that nobody has had
    ],
)
def test_a_window_of_whatever_length_that_was_forged_is_found(window: str, change: dict[str, Any] | None) -> None:
    topics = with_other_windows()
    key = f"{window}|total"
    name, _, start = window.partition("|")
    if change is None:
        topics.put(SETTINGS.metrics_topic, key, None)
    else:
        true = key if window in windows_there(topics) else f"{OLD_WINDOW}|total"
        record = topics.newest(SETTINGS.metrics_topic, true)
        topics.put(
            SETTINGS.metrics_topic, key, {**record, "window_type": name, "window_start": start, "batch": 1, **change}
        )
    report = audited(topics)
    assert (report.verdict, report.windows["wrong"]) == ("disagreed", 1)
    assert name in report.findings[0].detail and start in report.findings[0].detail


def test_windows_of_a_former_query_that_has_not_said_what_they_are_are_counted_apart() -> None:
    topics = with_other_windows(says_windows=False)
    report = audited(topics)
    former = {window for window in windows_there(topics) if window.startswith("tumbling_10s|")}
    assert report.verdict == "agreed" and report.windows["other_definition"] == len(former) > 5


def test_live_no_window_of_a_former_length_is_wrong_or_left_over_but_one_that_was_forged() -> None:
    topics = with_other_windows()
    later_ms = SystemClock().now_ms() + 60_000

    def live(verdicts: Verdicts, expected: dict[str, Any]) -> Verdicts:
        for row in topics.of(SETTINGS.metrics_topic):
            verdicts.actual(json.loads(row.value or b""))
        for key, record in expected.items():
            if key != "oracle":
                verdicts.expect(record)
        # the new query is as far as the former one was
        verdicts.job_at(2, START_MS + 3_600_000, later_ms - 30_000)
        verdicts.oracle_at(2, later_ms - 30_000)
        verdicts.oracle_at(2, later_ms)
        return verdicts

    published = Topics()
    for key, record in followed(WORLD)[1].items():  # by the oracle of the former run
        if key != "oracle":
            published.put(SETTINGS.expected_topic, key, record)
    for before in (None, published):  # from the beginning, and where another one has left off
        expected = {r.key or "": json.loads(r.value or b"") for r in published.of(SETTINGS.expected_topic)}
        stage, found = followed(topics, before)
        assert stage.status()["state"] == "stopped" and stage.status()["passed_over"] == 0
        verdicts = live(Verdicts(), {**(expected if before else {}), **found})
        tally = verdicts.tally(later_ms)
        former = [w for w in windows_there(topics) if w.startswith("tumbling_10s|")]
        said = [verdicts.of("tumbling_10s", epoch_ms(w.partition("|")[2]), later_ms)["verdict"] for w in former]
        assert (tally.wrong, tally.first_wrong) == (0, "") and set(said) <= {"verified", "late by design"}
        forged = topics.newest(SETTINGS.metrics_topic, f"{OLD_WINDOW}|total")
        verdicts.actual({**forged, "window_start": iso_ms(START_MS + 10_000_000), "batch": 1})
        assert verdicts.tally(later_ms).wrong == 1


# -- the same query, or one with the same windows: what judges must not mix up


def started_again(at: int, top_n: int, killed: bool) -> Topics:
    """The world, from a micro-batch on by a job that was started again with another ``--top-n``.

    Args:
        at: that micro-batch.
        top_n: the other one.
        killed: the job before had published that micro-batch, and not committed it: it runs again.
    """
    other, engine = SETTINGS.model_copy(update={"top_n": top_n}), ExpectedWindows(CATALOGUE, SPECS, 5_000, 120)
    replays = {p: ShardReplay(MODELS[p], progress_of(p, 10_000)) for p in range(2)}
    found = tampered()
    found.records[SETTINGS.metrics_topic], found.records[SETTINGS.batches_topic] = [], []
    for row in WORLD.of(SETTINGS.batches_topic):
        said = json.loads(row.value or b"")
        batch = said["batch"]
        engine.advance(Cut(batch, {int(p): of["valid"] for p, of in said["partitions"].items()}), replays)
        changed = [engine.record(window) for window in engine.changed() if window in engine.open]
        engine.close()
        for settings in (SETTINGS, other) if killed and batch == at else (other if batch >= at else SETTINGS,):
            for record in changed:
                movies = record["movies"][: settings.top_n]
                for key, view in metrics_of({**record, "movies": movies}):
                    found.put(SETTINGS.metrics_topic, key, view)
            first = batch == (at if settings is other else 0)
            told = {"windows": windows_of(settings)} if first else {}
            found.put(SETTINGS.batches_topic, str(batch), {**said, **told})
    found.put(SETTINGS.progress_topic, "windows", windows_of(other))
    return found


def with_a_fresh_checkpoint(batches: int = 3, read: int = 3, at_ms: int = START_MS) -> Topics:
    """The run's topics after its job began anew with the same windows: it reads in time what had come too late.

    Args:
        batches: in how many micro-batches it reads all.
        read: how many of them there have been.
        at_ms: when.
    """
    found = tampered()
    sent = {p: int(found.newest(SETTINGS.progress_topic, f"shard/{p}")["next_index"]) for p in range(2)}
    reads = [{p: n * part // batches for p, n in sent.items()} for part in range(1, read + 1)]
    job(found, SETTINGS, reads, {p: ShardReplay(MODELS[p], progress_of(p, n)) for p, n in sent.items()}, at_ms=at_ms)
    return found


def wrong_live(topics: Topics, *expected: dict[str, Any]) -> tuple[int, str]:
    """How many windows are wrong beside what oracles published one after another, and the first of them."""
    verdicts = Verdicts()
    for row in topics.of(SETTINGS.metrics_topic):
        verdicts.actual(json.loads(row.value or b""))
    for key, record in {key: record for found in expected for key, record in found.items()}.items():
        if key != "oracle":
            verdicts.expect(record)
    tally = verdicts.tally(SystemClock().now_ms() + 60_000)
    return tally.wrong, tally.first_wrong


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("top_n", [3, 12])
@pytest.mark.parametrize("at", [0, 1, 4, 7, 8, 9, 10, 11])
def test_a_job_that_was_started_again_with_another_top_n_is_right(at: int, top_n: int, killed: bool) -> None:
    topics = started_again(at, top_n, killed)
    lengths = {len(json.loads(r.value or b"").get("movies", [])) for r in topics.of(SETTINGS.metrics_topic)}
    assert top_n in lengths
    report, true = audited(topics), audited(WORLD)
    assert (report.verdict, report.findings, report.windows) == ("agreed", [], true.windows)
    stage, expected = followed(topics)
    assert stage.status()["batch"] == BATCHES - 1
    assert wrong_live(topics, expected) == (0, "")


def test_a_list_of_movies_that_is_longer_or_shorter_than_it_was_to_be_is_found_all_the_same() -> None:
    topics = started_again(8, 12, killed=False)
    for key, batch in {
        r.key or "": json.loads(r.value or b"")["batch"]
        for r in topics.of(SETTINGS.metrics_topic)
        if (r.key or "").endswith("topn")
    }.items():
        again = Topics({topic: list(rows) for topic, rows in topics.records.items()})
        true = topics.newest(SETTINGS.metrics_topic, key)
        other = true["movies"][:7] if batch >= 8 else [*true["movies"], *true["movies"][:5]]
        again.put(SETTINGS.metrics_topic, key, {**true, "movies": other})
        report = audited(again)
        assert (report.verdict, report.windows["wrong"]) == ("disagreed", 1)
        assert f"{len(other)} movie rows are there, {len(true['movies'])} are expected" in report.findings[0].detail


@pytest.mark.parametrize("late_ms", [0, 30_000, -30_000])
def test_what_was_final_in_a_former_query_of_the_same_windows_is_not_settled_in_the_next(late_ms: int) -> None:
    former = followed(WORLD)[1]
    topics = with_a_fresh_checkpoint(at_ms=START_MS + late_ms)
    assert audited(topics).verdict == "agreed"
    before = Topics()
    for key, record in former.items():
        before.put(ANYBODY.expected_topic, key, record)
    stage, found = followed(topics, before)
    assert stage.status()["batch"] == 2 and wrong_live(topics, former, found) == (0, "")
    for key, record in found.items():
        before.put(ANYBODY.expected_topic, key, record)
    third = followed(topics, before)[1]  # and its own successor, which makes no window anew that is settled
    assert 0 < len(third) < len(found) and wrong_live(topics, former, found, third) == (0, "")


HISTORIES = {
    "fresh": with_a_fresh_checkpoint(),
    "fresh, not far": with_a_fresh_checkpoint(read=1),
    "other windows": with_other_windows(),
    "top-n": started_again(8, 12, killed=False),
    "top-n, killed": started_again(8, 3, killed=True),
}


@hypothesis_settings(max_examples=40, derandomize=True)
@given(st.data())
def test_wherever_an_oracle_ended_its_successor_ends_where_one_alone_does(data: st.DataObject) -> None:
    topics = HISTORIES[data.draw(st.sampled_from(sorted(HISTORIES)))]
    alone, said, before = followed(topics)[1], {}, Topics()
    for _ in range(data.draw(st.integers(1, 2))):
        so_far, published = Topics({**topics.records}), Published()
        cuts = topics.of(SETTINGS.batches_topic)
        so_far.records[SETTINGS.batches_topic] = cuts[: data.draw(st.integers(0, len(cuts)))]
        followed(so_far, before, published)
        for key, record in published.log[: data.draw(st.integers(0, len(published.log)))]:
            before.put(ANYBODY.expected_topic, key, record)
            said[key] = record
    said.update(followed(topics, before)[1])
    fields = ("count", "histogram", "movies", "genres", "batch", "final", "unread")
    assert {key: [said[key][name] for name in fields] for key in alone if key != "oracle"} == {
        key: [record[name] for name in fields] for key, record in alone.items() if key != "oracle"
    }
    assert wrong_live(topics, said) == (0, "")


def test_what_may_change_once_more_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    def settled(*rows: tuple[int, int, bool, int, int]) -> Settled:
        """(number of the window, last micro-batch that changed it, final, unread, query)"""
        published = Topics()
        for n, batch, final, unread, query_ms in rows:
            said = {"window_type": "tumbling_10s", "window_end": iso_ms(START_MS + n), "final": final, "unread": unread}
            published.put(ANYBODY.expected_topic, str(n), {**said, "batch": batch, "query_ms": query_ms})
        monkeypatch.setattr(oracle_module, "read_topic", lambda _, topic: iter(published.of(topic)))
        return OracleStage(ANYBODY, "nowhere")._settled()

    def until(n: int) -> Settled:
        return Settled(8, {"tumbling_10s": START_MS + n})

    first = [(n, n // 10, True, 0, 8) for n in (10, 20, 30)]
    assert settled() == settled((40, 4, False, 0, 8)) == Settled(-1, {})
    assert settled(*first, (40, 4, False, 0, 8)) == until(29)  # the last end may be incomplete
    assert settled(*first, (31, 3, True, 0, 8)) == until(29)  # what the last micro-batch changed
    assert settled(*first, (11, 1, True, 5, 8), (21, 2, False, 0, 8)) == until(10)
    assert settled(*first, (21, 2, False, 0, 8)) == until(20)  # it was being made anew
    assert settled(*first, (40, 9, True, 5, 7), (5, 9, False, 0, 7)) == until(29)  # of a former query
    assert settled(*first, (40, 4, True, 0, 9)) == Settled(9, {"tumbling_10s": START_MS + 39})


def test_what_an_earlier_version_made_final_is_made_anew() -> None:
    former, before = followed(WORLD)[1], Topics()
    for key, record in former.items():
        before.put(ANYBODY.expected_topic, key, {n: v for n, v in record.items() if n != "query_ms"})
    assert followed(WORLD, before)[1].keys() == former.keys()


class GoneAndBack(Published):
    """A producer of a broker that was away for so long that all that waited timed out at once."""

    def __init__(self, timed_out: int, on_delivery: Any) -> None:
        super().__init__()
        self._timed_out, self._on_delivery = timed_out, on_delivery

    def poll(self, _: float) -> int:
        for _ in range(self._timed_out):
            self._on_delivery(SimpleNamespace(str=lambda: "Local: Message timed out"), None)
        return 0


def test_records_that_timed_out_together_are_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_out, clock = [30], FakeClock(START_MS)

    def producer(_: str, on_delivery: Any) -> GoneAndBack:
        return GoneAndBack(timed_out.pop() if timed_out else 0, on_delivery)

    monkeypatch.setattr(oracle_module, "follow", lambda *_: iter([[]]))
    monkeypatch.setattr(oracle_module, "read_topic", lambda *_: iter(()))
    monkeypatch.setattr(oracle_module, "make_producer", producer)
    monkeypatch.setattr(oracle_module, "OutsideLedger", NobodyOutside)
    monkeypatch.setattr(oracle_module, "Publisher", lambda _: Scores())
    stage = OracleStage(ANYBODY, "nowhere", clock)
    stage.start()
    stage.stop()
    assert (stage.status()["state"], stage.status()["restarts"]) == ("stopped", 1)


# -- rubbish


def test_rubbish_in_the_topics_does_not_end_the_verification() -> None:
    true = followed(WORLD)[1]
    topics = tampered()
    for key, value, _ in PROGRESS:
        topics.put(SETTINGS.progress_topic, key, value if not isinstance(value, dict) else {"next_index": 1, **value})
    for value in (b"x", None, [], {"batch": -1}):
        topics.put(SETTINGS.batches_topic, "x", value)
    topics.records[SETTINGS.progress_topic].insert(
        0, Record(SETTINGS.progress_topic, 0, 0, "shard/0", b"first of all", 0)
    )
    stage, found = followed(topics)
    status = stage.status()
    assert (status["state"], status["batch"], status["passed_over"]) == ("stopped", BATCHES - 1, len(PROGRESS) + 5)
    assert "is passed over" in status["reason"]
    strip = ("final_ms", "updated_ms")
    assert {k: {n: v for n, v in r.items() if n not in strip} for k, r in found.items() if k != "oracle"} == {
        k: {n: v for n, v in r.items() if n not in strip} for k, r in true.items() if k != "oracle"
    }


def test_rubbish_among_the_expected_windows_does_not_keep_an_oracle_from_starting() -> None:
    before = Topics()
    for value in (b"x", [], {"final": True}, {"final": True, "window_end": "never", "unread": 0}, None):
        before.put(ANYBODY.expected_topic, "tumbling_10s|x", value)
    assert followed(WORLD, before)[0].status()["state"] == "stopped"


def test_rubbish_in_the_topics_does_not_end_the_answer_key() -> None:
    settings, topics, read = SETTINGS.model_copy(update={"late_share": 0.1}), Topics(), threading.Event()
    run = {"run": "run", "config": settings.digest(CATALOGUE.digest), "catalogue": CATALOGUE.digest}
    topics.put(SETTINGS.progress_topic, "run", {**run, "settings": settings.event_settings()})
    for key, value, _ in PROGRESS:
        topics.put(SETTINGS.progress_topic, key, value)
    for value in (b"x", [], {"guard_ms": settings.guard_ms, "index": "1"}, None):
        topics.put(SETTINGS.truth_topic, "reached/0", value)

    def follow(_: str, names: list[str], __: bool, end: threading.Event, ___: Any) -> Iterator[list[Record]]:
        yield [record for name in names for record in topics.of(name)]
        read.set()
        while not end.wait(0.01):
            yield []

    with pytest.MonkeyPatch.context() as patch:
        for module in (answers_module, audit_module):
            patch.setattr(module, "read_topic", lambda _, topic: iter(topics.of(topic)))
        patch.setattr(answers_module, "follow", follow)
        patch.setattr(answers_module, "make_producer", lambda *_, **__: Published())
        feed = AnswerFeed(ANYBODY, "nowhere", SystemClock())
        feed.start()
        assert read.wait(30)
        feed.stop()
    assert (feed.status()["state"], feed.status()["reason"]) == ("stopped", "")


@pytest.mark.parametrize(("sent", "certain"), [(700, 0), (918, 0), (919, 1), (10_000, 2)])
def test_an_answer_key_that_goes_on_waits_for_progress_beyond_its_mark(sent: int, certain: int) -> None:
    """What it reads first of the shards' progress may be older than the mark."""
    shard = answers_module._Shard(918, 0)
    shard.replay = cast("ShardReplay", SimpleNamespace(progress=SimpleNamespace(next_index=sent)))
    shard.waiting.extend(Record("ratings", 0, offset, None, None, 0) for offset in range(2))
    assert answers_module._Session._certain(shard) == certain


# -- the scoreboard


class Scores:
    """What a scoreboard publishes, the newest of each key."""

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}

    def put(self, _: str, key: str, value: dict[str, Any]) -> None:
        self.records[key] = value

    def close(self) -> None:
        pass


def scored(topics: Topics, crash: Exception | None = None) -> tuple[ScoreFeed, dict[str, Any]]:
    """A scoreboard that has followed topics to their end, or to a crash, and what it has published."""
    published, read = Scores(), threading.Event()

    def follow(_: str, names: list[str], __: bool, end: threading.Event) -> Iterator[list[Record]]:
        yield [record for name in names for record in topics.of(name)]
        read.set()
        if crash is not None:
            raise crash
        end.wait(30)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_module, "read_topic", lambda _, topic: iter(topics.of(topic)))
        patch.setattr(scoring_module, "follow", follow)
        patch.setattr(scoring_module, "Publisher", lambda _: published)
        feed = ScoreFeed(ANYBODY, "nowhere", SystemClock())
        feed.start()
        assert read.wait(30)
        feed.stop()
    return feed, published.records


def predicted() -> Topics:
    """The world, and a learner that has predicted every rating of partition 0."""
    topics = tampered()
    for row in WORLD.of(f"{SETTINGS.ratings_topic}/0"):
        rating = json.loads(row.value or b"")
        topics.put(ANYBODY.predictions_topic, "mine", {**rating, "prediction": 3.0, "model": "mine"})
    return topics


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "updated_ms"}


def test_rubbish_in_the_progress_topic_neither_ends_the_scoreboard_nor_changes_a_score() -> None:
    true = scored(predicted())[1]
    assert true["mine"]["scored"] > 100 and 0.3 < true["mine"]["coverage"] < 0.7
    topics = predicted()
    for key, value, _ in PROGRESS:
        if isinstance(value, dict) and key != "shard/x":
            value = {**WORLD.newest(SETTINGS.progress_topic, key), **value}
        topics.put(SETTINGS.progress_topic, key, value)
    newest = WORLD.newest(SETTINGS.progress_topic, "shard/0")
    # right configuration and share: only its own plan gives it away
    topics.put(SETTINGS.progress_topic, "shard/0", {**newest, "next_index": 1_000_000})
    feed, found = scored(topics)
    assert feed.status()["state"] == "stopped"
    assert without_time(found["mine"]) == without_time(true["mine"])


def test_progress_of_another_run_or_configuration_does_not_count() -> None:
    topics = predicted()
    true = scored(topics)[1]["mine"]
    for changes in ({"run": "other"}, {"config": "0123456789abcdef"}, {"share": 0.9}):
        newest = WORLD.newest(SETTINGS.progress_topic, "shard/1")
        topics.put(SETTINGS.progress_topic, "shard/1", {**newest, "next_index": 1, **changes})
    assert without_time(scored(topics)[1]["mine"]) == without_time(true)


def test_how_the_scoreboard_stands_is_published() -> None:
    assert scored(WORLD)[1][""]["state"] == "stopped"  # although nobody has predicted anything
    feed, found = scored(predicted(), RuntimeError("a mistake"))
    assert feed.status()["state"] == found[""]["state"] == "failed"
    assert found[""]["reason"] == "RuntimeError: a mistake" and found[""]["records"] > 100


# -- records


@pytest.mark.parametrize("value", [b"", b"rubbish", b"[1]", b"null", b"{}", b"[" * 100_000])
def test_what_is_no_progress_record_is_an_error_with_problem_and_fix(value: bytes) -> None:
    with pytest.raises(RecordError, match="progress record") as caught:
        ShardProgress.from_json(value)
    assert (
        isinstance(caught.value, RayPipelineError) and caught.value.exit_code == 2 and "shard/<p>" in caught.value.fix
    )


def test_what_the_micro_batches_read_is_held_in_a_few_bytes_each() -> None:
    log, count = CutLog(4), 20_000
    tracemalloc.start()
    for batch in range(count):
        log.add(Cut(batch, {p: 1_000 * batch for p in range(4)}, {p: 1_001 * batch for p in range(4)}))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 100 * count  # 8 + 4 · 16 bytes, and an array's reserve
    assert next(cut for cut in log.cuts(OutsideRatings()) if cut.batch == 77).read == dict.fromkeys(range(4), 77_000)


def test_other_processes_are_started_for_so_many_records_as_pay_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {0: (0, 0), 1: (0, 0)}
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(read_module, "make_consumer", lambda _: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(read_module, "watermark_offsets", lambda _, __, partition, timeout_s: ends[partition])
    for records, processes in ((0, 1), (100_000, 1), (700_000, 4), (9_000_000, 4)):
        ends[0], ends[1] = (50, 50 + records // 2), (0, records - records // 2)
        assert audit_module._worth_starting(SETTINGS, "nowhere") == processes
