"""Windows in Kafka beside what they must hold, as the feed takes them in and the API shows them; whoever wrote the records."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console

from ray_pipeline.clock import FakeClock
from ray_pipeline.command import asking
from ray_pipeline.config import load_settings
from ray_pipeline.kafka.read import Record
from ray_pipeline.metrics import verdicts as verdicts_module
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.metrics.verdicts import Verdicts
from ray_pipeline.serving import feed as feed_module
from ray_pipeline.serving.feed import Feed
from ray_pipeline.truth.oracle import expected_key
from ray_pipeline.truth.windows import Cut
from ray_pipeline.windows.spec import epoch_ms, iso_ms
from tests.unit import test_metrics, test_serving, test_truth

NOW = test_truth.START_MS + 600_000
WINDOW = "tumbling_10s"
ENDPOINTS = (
    "/metrics/health",
    "/metrics/summary",
    "/metrics/verification",
    f"/metrics/topn?window_type={WINDOW}",
    f"/metrics/genres?window_type={WINDOW}",
    f"/metrics/history?window_type={WINDOW}",
    "/metrics/history?format=csv",
    "/metrics/plan",
    "/metrics",
    "/predictions/scores",
)


class Live:
    """Feed, store and API of one pipeline, without a broker: its records are handed to the feed."""

    def __init__(self, now_ms: int = NOW) -> None:
        self.settings = load_settings(tumbling_s=10, sliding_s=30, slide_s=10)
        self.clock = FakeClock(now_ms)
        self.store = MetricsStore((WINDOW, "sliding_30s_10s"))
        self.store.kafka_connected = True
        self.feed = Feed(self.settings, "nowhere:1", self.store, self.clock)
        self.client: TestClient = test_serving.make(self.store, clock=self.clock)[0]
        self.records: list[Record] = []

    def take(self, topic: str, key: str, value: Any) -> None:
        """A record of a topic: bytes, None for one that was deleted, else an object to be written as JSON."""
        data = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
        name = getattr(self.settings, f"{topic}_topic")
        self.records.append(Record(name, 0, len(self.records), key, data, self.clock.now_ms()))
        self.feed._take(self.records[-1])

    def stages(self, batch: int = 7, oracle: int = 7, watermark_ms: int | None = None) -> None:
        """Generator, job and oracle say that they are well."""
        now_ms = self.clock.now_ms()
        self.take("progress", "generator", test_metrics.generator(updated_ms=now_ms))
        job = test_metrics.job(batch=batch, updated_ms=now_ms, partitions={}, watermark_ms=watermark_ms)
        self.take("job", "job", job)
        self.take("expected", "oracle", {"state": "running", "batch": oracle, "updated_ms": now_ms})

    def pass_time(self, seconds: float, **stages: Any) -> None:
        self.clock.advance(seconds)
        self.stages(**stages)

    def windows(self, count: int, **changes: Any) -> None:
        """Windows that hold what they must."""
        for n in range(count):
            expected, records = window(n, **changes)
            self.take("expected", expected_key(expected), expected)
            for record in records:
                self.take("metrics", key_of(record), record)

    def health(self) -> tuple[str, str]:
        answer = self.client.get("/metrics/health")
        assert answer.status_code == 200, answer.text
        return answer.json()["status"], "; ".join(answer.json()["reasons"])

    def tally(self) -> dict[str, Any]:
        answer = self.client.get("/metrics/verification")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def status(self) -> dict[str, Any]:
        """What the command ``status`` makes of the same records."""

        def newest(_: str, topic: str, __: float, each: Callable[[Record], None] = lambda _: None) -> dict[str, Record]:
            found: dict[str, Record] = {}
            for record in (record for record in self.records if record.topic == topic):
                each(record)
                found[record.key or ""] = record
            return {key: record for key, record in found.items() if record.value is not None}

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(asking, "newest_records", newest)
            patched.setattr(asking.time, "time_ns", lambda: self.clock.now_ms() * 1_000_000)
            return asking._verdicts(self.settings, "nowhere:1")


def window(n: int, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    expected, records = test_truth.window_pair(n, outside=0, **changes)
    return expected, [{**record, "updated_ms": NOW} for record in records]


def key_of(record: dict[str, Any]) -> str:
    return f"{record['window_type']}|{record['window_start']}|{record['kind']}"


def live(count: int = 3, **changes: Any) -> Live:
    found = Live()
    found.windows(count, **changes)
    found.stages()
    found.pass_time(20)
    assert found.health() == ("healthy", "")
    return found


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: {field: value for field, value in record.items() if field != name}


RUBBISH: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("no histogram", without("histogram"), "histogram: Field required"),
    ("a text", lambda r: {**r, "count": "abc"}, "count: Input should be a valid integer"),
    ("null", lambda r: {**r, "count": None}, "count: Input should be a valid integer"),
    ("no JSON", lambda _: b"{", "it is not JSON"),
    ("a list", lambda _: [], "should be a valid dictionary"),
    ("brackets", lambda _: b"[" * 100_000, "it is not JSON"),
    ("infinite", lambda r: json.dumps(r).replace("3.2", "1e999").encode(), "it is not JSON"),
    ("another window", lambda r: {**r, "window_start": iso_ms(0)}, "which its key does not say"),
    ("ends early", lambda r: {**r, "window_end": iso_ms(0)}, "after window_start"),
    ("far away", lambda r: {**r, "updated_ms": 10**18}, "updated_ms"),
]


@pytest.mark.parametrize(("alter", "said"), [(a, s) for _, a, s in RUBBISH], ids=[n for n, _, _ in RUBBISH])
def test_a_window_whose_record_cannot_be_read_is_wrong_and_named_until_it_can(
    alter: Callable[[dict[str, Any]], Any], said: str
) -> None:
    pipeline = live()
    total = window(1)[1][0]
    pipeline.take("metrics", key_of(total), alter(total))
    status, reasons = pipeline.health()
    assert status == "unhealthy" and said in reasons and f"{WINDOW} from {total['window_start']}" in reasons
    assert (pipeline.tally()["verified"], pipeline.tally()["wrong"]) == (2, 1)
    assert pipeline.feed.malformed == 1
    for path in ENDPOINTS:
        assert pipeline.client.get(path).status_code == 200, path
    pipeline.take("metrics", key_of(total), total)
    assert pipeline.health() == ("healthy", "") and pipeline.tally()["verified"] == 3


@pytest.mark.parametrize("value", [b"rubbish", {"count": 5}, {**window(1)[0], "final_ms": None}])
def test_a_window_of_which_it_cannot_be_read_what_it_must_hold_is_wrong(value: Any) -> None:
    pipeline = live()
    expected = window(1)[0]
    pipeline.take("expected", expected_key(expected), value)
    assert pipeline.health()[0] == "unhealthy" and "what it must hold cannot be read" in pipeline.health()[1]
    pipeline.take("expected", expected_key(expected), expected)
    assert pipeline.health() == ("healthy", "")


def test_a_record_under_a_key_that_names_no_window_is_wrong_until_it_is_deleted() -> None:
    pipeline = live()
    start = window(1)[0]["window_start"]
    for key in ("rubbish", f"{WINDOW}|2023-11-14T22:14:00Z|total", f"{WINDOW}|{start}|mean", f"{WINDOW}|{start}"):
        pipeline.take("metrics", key, window(1)[1][0])
        assert pipeline.health()[0] == "unhealthy" and "names no window" in pipeline.health()[1]
        pipeline.take("metrics", key, None)
        assert pipeline.health() == ("healthy", "")
    for key in ("rubbish", f"{WINDOW}|{start}|total"):
        pipeline.take("expected", key, window(1)[0])
        assert pipeline.health()[0] == "unhealthy" and "of another window than its key says" in pipeline.health()[1]
        pipeline.take("expected", key, None)
        assert pipeline.health() == ("healthy", "")


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_window_of_which_a_record_was_deleted_is_missing(kind: int) -> None:
    pipeline = live()
    record = window(2)[1][kind]
    pipeline.take("metrics", key_of(record), None)
    assert pipeline.health()[0] == "unhealthy" and f"there is no {record['kind']} record" in pipeline.health()[1]
    assert record["window_start"] not in {w["window_start"] for w in pipeline.store.history(WINDOW)} or kind
    pipeline.take("metrics", key_of(record), record)
    assert pipeline.health() == ("healthy", "")


def test_an_open_window_whose_record_was_deleted_is_pending() -> None:
    pipeline = live(final=False, final_ms=None)
    pipeline.take("metrics", key_of(window(0)[1][0]), None)
    assert pipeline.health() == ("healthy", "") and pipeline.tally()["pending"] == 3


@pytest.mark.parametrize("value", [None, b"rubbish", {"count": 4}])
def test_one_record_of_a_window_whose_details_are_forgotten_still_shows_an_alteration(value: Any) -> None:
    pipeline = live(verdicts_module._DETAILS_KEPT + 5)
    total = window(0)[1][0]
    pipeline.take("metrics", key_of(total), {**total, **value} if isinstance(value, dict) else value)
    assert pipeline.health()[0] == "unhealthy" and total["window_start"] in pipeline.health()[1]
    pipeline.take("metrics", key_of(total), total)
    assert pipeline.health() == ("healthy", "")
    pipeline.take("expected", expected_key(window(0)[0]), None)
    assert pipeline.health()[0] == "unhealthy" and "was deleted" in pipeline.health()[1]


def test_windows_made_anew_are_compared_anew_though_their_details_are_forgotten() -> None:
    pipeline = live(verdicts_module._DETAILS_KEPT + 5)
    expected, records = window(0, count=4, histogram=[0, 1, 0, 0, 0, 2, 1, 0, 0, 0])
    for record in records:
        pipeline.take("metrics", key_of(record), record)
    assert pipeline.health()[0] == "unhealthy"
    pipeline.take("expected", expected_key(expected), expected)
    assert pipeline.health() == ("healthy", "")


def test_a_window_of_a_query_that_began_anew_waits_for_the_oracle_to_begin_anew_too() -> None:
    pipeline = live()
    expected, records = window(50, batch=0)
    pipeline.pass_time(1, batch=0, oracle=7)  # it has not heard of the new query yet
    for record in records:
        pipeline.take("metrics", key_of(record), record)
    assert pipeline.health() == ("healthy", "")
    pipeline.pass_time(2, batch=0, oracle=0)
    pipeline.take("expected", expected_key(expected), expected)
    assert pipeline.health() == ("healthy", "")


@pytest.mark.parametrize("batch", [3, 8, 10**9])
def test_a_window_to_which_no_rating_belongs_is_wrong_once_the_oracle_has_passed_it(batch: int) -> None:
    pipeline = live()
    for record in window(50)[1]:
        pipeline.take("metrics", key_of(record), {**record, "batch": batch})
    if batch == 8:  # of a micro-batch that the oracle has still to reach
        assert pipeline.health() == ("healthy", "")
        pipeline.pass_time(2, batch=8, oracle=8)
        assert pipeline.health() == ("healthy", "")  # what it must hold may be on its way
        pipeline.pass_time(6, batch=8, oracle=8)
    status, reasons = pipeline.health()
    assert status == "unhealthy" and "is there, but no rating belongs to it" in reasons
    for record in window(50)[1]:
        pipeline.take("metrics", key_of(record), None)
    assert pipeline.health() == ("healthy", "")


def test_an_oracle_that_died_may_not_have_said_all_that_it_had_reached() -> None:
    pipeline = live()
    pipeline.pass_time(2, batch=8, oracle=8)
    for record in window(50, batch=8)[1]:
        pipeline.take("metrics", key_of(record), record)
    pipeline.clock.advance(30)
    assert pipeline.tally()["wrong"] == 0


def test_a_closed_window_without_a_verdict_degrades_health_after_ten_seconds() -> None:
    pipeline = live()
    _, records = window(3, batch=8)
    for record in records:
        pipeline.take("metrics", key_of(record), record)
    end_ms = epoch_ms(records[0]["window_end"])
    for _ in range(5):
        pipeline.pass_time(2, batch=8, oracle=7, watermark_ms=end_ms - 1)
    assert pipeline.health() == ("healthy", "")  # it is open
    for _ in range(5):
        pipeline.pass_time(2, batch=9, oracle=7, watermark_ms=end_ms)
        assert pipeline.health() == ("healthy", "")
    assert pipeline.status()["overdue"] == 0
    pipeline.pass_time(2, batch=9, oracle=7, watermark_ms=end_ms)
    assert pipeline.status()["overdue"] == pipeline.tally()["overdue"] == 1
    status, reasons = pipeline.health()
    assert status == "degraded" and f"from {records[0]['window_start']} was closed more than 10 s ago" in reasons
    expected, _ = window(3, batch=8)
    pipeline.take("expected", expected_key(expected), expected)
    assert pipeline.health() == ("healthy", "")


def test_a_wrong_window_that_is_forgotten_is_still_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts_module, "_WINDOWS_KEPT", 5)
    verdicts = Verdicts()
    for n in range(12):
        expected, records = window(n)
        verdicts.expect(expected)
        for record in records:
            verdicts.actual({**record, "count": 4} if n == 1 and record["kind"] == "total" else record)
        verdicts.tally(test_truth.LATER_MS)
    found = verdicts.tally(test_truth.LATER_MS)
    assert (found.verified, found.wrong) == (11, 1)
    assert iso_ms(test_truth.START_MS + 10_000) in found.first_wrong and "holds 4 ratings" in found.first_wrong
    assert len(verdicts.wrong(test_truth.LATER_MS)) == 1
    for record in window(0)[1]:  # older than all that are kept
        verdicts.actual(record)
    assert verdicts.tally(test_truth.LATER_MS) == found


class Pairs(dict[Any, Any]):
    """Counts how often all windows are looked at."""

    looked = 0

    def __iter__(self) -> Any:
        self.looked += 1
        return super().__iter__()


def test_however_many_windows_there_are_a_new_one_or_an_old_one_is_no_look_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verdicts_module, "_WINDOWS_KEPT", 50)
    verdicts = Verdicts()
    verdicts._pairs = pairs = Pairs()
    starts = [*range(0, 60), *range(10), *range(100, 150)]  # new ones, forgotten ones, new ones after a gap
    for n in starts:
        verdicts.actual(window(n)[1][0])
    assert pairs.looked == 0
    assert sorted(pairs) == [(WINDOW, epoch_ms(window(n)[0]["window_start"])) for n in range(100, 150)]
    for n in (0, 59, 70, 99):  # older than all that are kept
        verdicts.expect(window(n)[0])
    assert len(pairs) == 50 and min(pairs) == (WINDOW, epoch_ms(window(100)[0]["window_start"]))


def test_a_forgotten_window_stays_forgotten_though_a_newer_one_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts_module, "_WINDOWS_KEPT", 5)
    verdicts = Verdicts()
    for n in range(8):
        verdicts.actual(window(n)[1][0])
    for n in (7, 5):
        verdicts.no_actual(key_of(window(n)[1][0]))
    verdicts.no_actual("rubbish", "is none")  # stands for itself, at the beginning of time
    verdicts.actual(window(1)[1][0])
    assert verdicts.tally(NOW).pending == 3 and verdicts.tally(NOW).wrong == 0
    for n in (5, 7, 8):
        verdicts.actual(window(n)[1][0])
    assert verdicts.tally(NOW).pending == 5  # 4, 5, 6, 7 and 8


STREAMS: dict[str, list[tuple[str, str, Any]]] = {
    name: [
        ("progress", "run", {"run": name, "config": "c", "settings": {}}),
        ("progress", "windows", {"max_ahead_s": 600.0}),
        *(("metrics", key_of(r), r) for n in windows for r in window(n, count=count)[1]),
        *(("expected", expected_key(window(n)[0]), window(n, count=count)[0]) for n in windows),
        ("job", "job", test_metrics.job(batch=7, updated_ms=NOW, partitions={})),
        ("expected", "oracle", {"state": "running", "batch": 7, "updated_ms": NOW}),
        ("rejected", "0/1", {"partition": 0, "offset": 1, "reason": name}),
    ]
    for name, windows, count in (("a", (0, 1, 2, 3), 3), ("b", (0, 1), 4))
}


@hypothesis_settings(max_examples=15, deadline=None)
@given(st.data())
def test_another_stream_after_a_reset_is_known_whole_in_whatever_order_its_records_are_read(
    data: st.DataObject,
) -> None:
    """What the feed makes of topics that were cleared while it looked away, and of a record of a run that sent nothing."""
    topics = sorted({topic for topic, _, _ in STREAMS["a"]})
    pipeline, followed = Live(), 0

    def read(said: list[tuple[str, str, Any]]) -> list[Record]:
        """Each topic in its order."""
        by_topic = {name: [row for row in said if row[0] == name] for name in topics}
        found = []
        for name in data.draw(st.permutations([topic for topic, _, _ in said])):
            topic, key, value = by_topic[name].pop(0)
            place = sum(1 for row, *_ in said if row == topic) - len(by_topic[name]) - 1
            full = getattr(pipeline.settings, f"{topic}_topic")
            found.append(Record(full, 0, place, key, json.dumps(value).encode(), NOW))
        return found

    sent_nothing = data.draw(st.booleans())
    second = [*(STREAMS["a"][:1] if sent_nothing else []), *STREAMS["b"]]

    def follow(_: str, __: list[str], ___: bool, stop: Any) -> Any:
        nonlocal followed
        followed += 1
        assert followed < 10
        if followed == 1:
            yield read(STREAMS["a"])
            raise KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART))
        for record in read(second):
            yield [record]
        stop.set()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(feed_module, "follow", follow)
        pipeline.feed._follow()
    pipeline.take("progress", "generator", test_metrics.generator(updated_ms=NOW))
    assert pipeline.store.run()["run"] == "b" and pipeline.store._guard_ms == 600_000
    assert [w["count"] for w in pipeline.store.history(WINDOW)] == [4, 4]
    assert [r["reason"] for r in pipeline.store.rejects()] == ["b"]
    assert pipeline.tally()["verified"] == 2 and pipeline.tally()["wrong"] == 0 and pipeline.health() == ("healthy", "")


def test_status_says_the_same_of_what_it_reads() -> None:
    pipeline, (expected, records) = Live(), window(0)
    pipeline.take("expected", expected_key(expected), expected)
    pipeline.take("expected", "oracle", {"batch": "x"})
    pipeline.take("expected", "rubbish", [])
    for record in records:
        pipeline.take("metrics", key_of(record), record)
    found = pipeline.status()
    assert (found["verified"], found["wrong"]) == (1, 1) and "must hold" in found["wrong_windows"][0]["reason"]
    pipeline.take("expected", "rubbish", None)
    assert (pipeline.status()["verified"], pipeline.status()["wrong"]) == (1, 0)
    pipeline.take("metrics", key_of(records[0]), {"count": 5})
    found = pipeline.status()
    assert (found["verified"], found["wrong"]) == (0, 1) and "Field required" in found["first_wrong"]
    assert found["newest"][0]["actual"] is None
    pipeline.take("metrics", key_of(records[0]), None)
    assert "there is no total record" in pipeline.status()["first_wrong"]


def test_status_shows_what_a_window_must_hold_and_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asking, "_console", Console(width=200))
    pipeline = live()
    total = window(2)[1][0]
    pipeline.take("metrics", key_of(total), {**total, "count": 4})
    found = pipeline.status()
    shown = [(w["expected"]["count"], w["actual"]["count"], w["difference"], w["verdict"]) for w in found["newest"]]
    assert shown == [(5, 5, 0, "verified"), (5, 5, 0, "verified"), (5, 4, -1, "WRONG")]
    asking._print_verdicts(found)
    lines = capsys.readouterr().out.splitlines()
    assert "2 verified, 0 pending, 0 late by design, 1 wrong, 0 overdue" in lines[0]
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]
    assert ["window", "from", "expected", "actual", "difference", "verdict", ""] in rows
    assert [WINDOW, total["window_start"], "5", "4", "-1", "WRONG"] in [row[:6] for row in rows]


def test_status_shows_why_a_job_that_runs_has_trouble(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = dict.fromkeys(("input_rate", "batch_duration_ms", "late_dropped", "rejected"), 0)
    job = test_metrics.job(application="a", query="windows", pool=None, pools=[], **numbers)
    asking._print_job(job)
    assert "disk" not in capsys.readouterr().out
    asking._print_job({**job, "reason": "a disk is full: /data"})
    assert "Query windows is running: a disk is full: /data" in capsys.readouterr().out.splitlines()


def test_health_shows_the_windows_by_verdict_and_the_wrong_ones_with_their_counts() -> None:
    pipeline = live(verdicts_module._DETAILS_KEPT + 5)
    total = window(1)[1][0]  # its details are forgotten
    row = pipeline.client.get("/metrics/history", params={"window_type": WINDOW}).json()["windows"][1]
    assert row["window_start"] == total["window_start"] and row["expected"]["count"] == row["actual"]["count"] == 5
    pipeline.take("metrics", key_of(total), {**total, "count": 4})
    for record in window(900)[1]:
        pipeline.take("metrics", key_of(record), record)
    found = pipeline.client.get("/metrics/health").json()["windows"]
    counts = [found[name] for name in ("verified", "pending", "late_by_design", "wrong", "overdue")]
    assert counts == [verdicts_module._DETAILS_KEPT + 4, 0, 0, 2, 0]
    altered, unclaimed = found["wrong_windows"]
    assert altered["window_start"] == total["window_start"] and altered["window_type"] == WINDOW
    assert (altered["expected"]["count"], altered["actual"]["count"]) == (5, 4) and "altered" in altered["reason"]
    assert unclaimed["expected"] is None and unclaimed["actual"]["count"] == 5 and unclaimed["difference"] is None
    for n in range(800, 830):
        for record in window(n)[1]:
            pipeline.take("metrics", key_of(record), record)
    found = pipeline.client.get("/metrics/health").json()["windows"]
    assert found["wrong"] == 32 and len(found["wrong_windows"]) == 20


@pytest.mark.parametrize("batch", [3, 8, 9, 10**9])
def test_status_says_of_a_window_to_which_no_rating_belongs_what_health_says(batch: int) -> None:
    pipeline = live()
    pipeline.pass_time(2, batch=8, oracle=8)
    for record in window(50)[1]:
        pipeline.take("metrics", key_of(record), {**record, "batch": batch})
    for _ in range(4):
        found, health = pipeline.status(), pipeline.tally()
        assert [found[name] for name in ("verified", "pending", "wrong", "first_wrong")] == [
            health[name] for name in ("verified", "pending", "wrong", "first_wrong")
        ]
        pipeline.pass_time(2, batch=8, oracle=8)
    assert (found["pending"], found["wrong"]) == ((1, 0) if batch == 9 else (0, 1))


# -- whatever comes in which order


@hypothesis_settings(max_examples=50)
@given(st.data())
def test_in_whatever_order_records_come_a_right_window_ends_verified_and_another_one_wrong(data: st.DataObject) -> None:
    """Each key's records in their order, as Kafka keeps it; between keys none. Job and oracle may begin anew at any time."""
    verdicts, now_ms = Verdicts(), NOW
    wrong = data.draw(st.sets(st.integers(0, 3)))
    rows: dict[str, list[tuple[str, Any]]] = {"job": [("job", n) for n in (5, 6, 7)]}
    rows["oracle"] = [("oracle", n) for n in data.draw(st.sampled_from([(7,), (5, 7), (7, 2, 7), (-1, 7)]))]
    for n in range(4):
        expected, records = window(n)
        still_open = {**expected, "final": False, "final_ms": None, "batch": 6}
        rows[expected_key(expected)] = [("expected", still_open), ("expected", expected)]
        for record in records:
            last = {**record, "count": record["count"] + 1} if n in wrong else record
            rows[key_of(record)] = [("actual", {**record, "batch": 6}), ("actual", last)]
    written: list[tuple[str, Any]] = []
    for name in data.draw(st.permutations([name for name, found in rows.items() for _ in found])):
        written.append(rows[name].pop(0))
    if data.draw(st.booleans()):  # the feed begins anew: what came comes once more
        written = written[: data.draw(st.integers(0, len(written)))] + written
    for kind, value in written:
        now_ms += data.draw(st.sampled_from([0, 100, 3_000]))
        if kind == "job":
            verdicts.job_at(value, NOW, now_ms)
        elif kind == "oracle":
            verdicts.oracle_at(value, now_ms)
        elif kind == "expected":
            verdicts.expect(dict(value))
        else:
            verdicts.actual(dict(value))
        verdicts.tally(now_ms)
    now_ms += 20_000
    for _ in range(2):
        verdicts.job_at(7, NOW, now_ms)
        verdicts.oracle_at(7, now_ms)
        tally = verdicts.tally(now_ms)
        now_ms += 20_000
    assert (tally.verified, tally.pending, tally.wrong, tally.overdue) == (4 - len(wrong), 0, len(wrong), 0)
    starts = {window(n)[0]["window_start"] for n in wrong}
    assert {row["window_start"] for row in verdicts.wrong(now_ms)} == starts


# -- whatever somebody writes


def broken(rng: random.Random, value: Any) -> Any:
    """A JSON value with something in it altered, somewhere."""
    rubbish: list[Any] = [None, "abc", "\ud800", [], {}, -1, True, 2**70, 10**400, 1e308, 0.5, [[]], {"count": 1}]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != name}
        return {**value, name: broken(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], broken(rng, value[at]), *value[at + 1 :]]
    return rng.choice([other for other in rubbish if other != value or isinstance(other, bool)])


def test_whatever_is_written_every_question_is_answered_and_an_altered_total_is_red() -> None:
    rng = random.Random(7)
    pipeline = live()
    score = test_serving.score("mine", 0.7)
    pipeline.take("scores", "mine", score)
    for number in range(150):
        topic = rng.choice(["metrics"] * 5 + ["expected"] * 3 + ["job", "oracle", "generator", "scores"])
        expected, records = window(rng.randrange(3))
        right: Any
        if topic == "metrics":
            right = rng.choice([records[0], *records])
            key = key_of(right)
        elif topic == "expected":
            right, key = expected, expected_key(expected)
        elif topic == "scores":
            right, key = score, "mine"
        else:
            right, key = {"state": "running", "updated_ms": NOW, "batch": 7, "partitions": {}, "epochs": []}, topic
        altered = broken(rng, right)
        text = json.dumps(altered).encode()
        value: Any = rng.choice([text, text, text, text, text[: rng.randrange(len(text))], None])
        pipeline.take({"oracle": "expected", "generator": "progress"}.get(topic, topic), key, value)
        for path in ENDPOINTS:
            answer = pipeline.client.get(path)
            assert answer.status_code == 200, (number, topic, key, value, path, answer.text)
        judged = ("window_start", "window_end", "window_type", "count", "avg_rating", "p50", "p95", "histogram")
        same = isinstance(altered, dict) and all(altered.get(name) == right.get(name) for name in judged)
        if topic == "metrics" and right["kind"] == "total" and not (same and value == text):
            status, reasons = pipeline.health()
            assert status == "unhealthy" and right["window_start"] in reasons, (number, value)
        if topic in ("metrics", "expected", "scores"):
            pipeline.take(topic, key, right)
        pipeline.stages()
        assert pipeline.health() == ("healthy", ""), (number, topic, value)


@pytest.mark.parametrize("run", [{}, [], {"settings": []}, {"settings": {"late_share": "x"}}, b"rubbish"])
def test_a_run_that_cannot_be_is_passed_over_and_what_was_read_is_still_compared(run: Any) -> None:
    pipeline = live()
    pipeline.take("progress", "run", run)
    assert pipeline.feed.malformed == 1
    pipeline.take("progress", "shard/0", test_metrics.shard_progress(120))
    read = {
        "0": {"records": 107, "next_offset": 107, "max_event_ms": test_metrics.shard_progress(100)["event_time_ms"]}
    }
    pipeline.take("job", "job", test_metrics.job(updated_ms=pipeline.clock.now_ms(), partitions=read))
    pipeline.clock.advance(11)
    assert "partition 0 holds 7 records that no shard sent" in pipeline.health()[1] and pipeline.feed.malformed == 1


# -- from the job's record to the API


def test_a_window_that_differs_is_red_within_ten_seconds_of_being_final() -> None:
    start_ms = test_truth.START_MS
    pipeline, oracle = Live(start_ms), test_truth.oracle_with((900, 540, 360))
    closed_ms: int | None = None
    wrong = f"{WINDOW}|{iso_ms(start_ms + 10_000)}"
    for second in range(60):
        batch = second // 4
        if second % 4 == 0:  # every four seconds the job reads what was due by then
            read = {p: min(n * batch // 4, n) for p, n in {0: 900, 1: 540, 2: 360}.items()}
            oracle.cut(test_truth.batch_record(Cut(batch, read)))
        pipeline.clock.advance(1)
        for record in oracle.step(pipeline.clock.now_ms()):
            for kind, actual in test_truth.actual_of(record).items():
                more = int(kind == "total" and expected_key(record) == wrong)
                told = {**actual, "kind": kind, "count": actual["count"] + more, "updated_ms": pipeline.clock.now_ms()}
                pipeline.take("metrics", key_of(told), told)
            pipeline.take("expected", expected_key(record), record)
            if record["final"] and expected_key(record) == wrong and closed_ms is None:
                closed_ms = pipeline.clock.now_ms()
        pipeline.stages(batch=batch, oracle=oracle.batch)
        status, reasons = pipeline.health()
        if closed_ms is not None and pipeline.clock.now_ms() - closed_ms >= 10_000:
            assert status == "unhealthy" and f"{WINDOW} from {iso_ms(start_ms + 10_000)} holds" in reasons
            assert pipeline.tally()["wrong"] == 1 and pipeline.tally()["verified"] >= 2
            return
    pytest.fail("the window was never final")
