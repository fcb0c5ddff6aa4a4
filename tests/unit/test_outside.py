"""Ratings from outside: accepted or refused, told apart from what nobody owns up to, and part of every expectation."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from confluent_kafka import KafkaError, KafkaException
from fastapi.testclient import TestClient
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.config import load_settings
from ray_pipeline.delivery import outside as delivery_module
from ray_pipeline.delivery.outside import OutsideDelivery
from ray_pipeline.errors import BrokerUnavailableError, DeliveryError
from ray_pipeline.events import EventBatch
from ray_pipeline.kafka.read import Record
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.pipeline import Pipeline
from ray_pipeline.serving import outside as outside_module
from ray_pipeline.serving.outside import OutsideQueue
from ray_pipeline.serving.predictions import QueueFull
from ray_pipeline.truth.audit import PartitionAudit
from ray_pipeline.truth.outside import OutsideRatings
from ray_pipeline.truth.windows import Cut, ExpectedWindows
from ray_pipeline.windows.reference import Ratings, reference
from tests.conftest import wait_for
from tests.unit import test_audit, test_metrics, test_serving, test_truth

NOW = test_serving.NOW
MOVIE = int(test_truth.CATALOGUE.movie_ids[5])


def record(partition: int, offset: int, ms: int, **changes: Any) -> dict[str, Any]:
    rating = {"userId": 10**6 + offset, "movieId": MOVIE, "rating": 4.5, "timestamp": ms}
    return {"partition": partition, "offset": offset, **rating, **changes}


# -- the ledger

rows = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50), st.integers(1, 10**6)), max_size=30)


@given(rows, st.integers(0, 2), st.integers(0, 51), st.integers(0, 51))
def test_records_may_come_in_any_order_and_twice(
    found: list[tuple[int, int, int]], partition: int, first: int, until: int
) -> None:
    ledger = OutsideRatings()
    known: dict[tuple[int, int], int] = {}
    for p, offset, ms in found:
        known.setdefault((p, offset), ms)
        ledger.add(record(p, offset, known[p, offset]))
    mine = {offset: ms for (p, offset), ms in known.items() if p == partition}
    assert ledger.before(partition, until) == sum(offset < until for offset in mine)
    assert ledger.newest_ms(partition, until) == max((ms for o, ms in mine.items() if o < until), default=-1)
    between = ledger.between(partition, first, until)
    assert between.timestamps_ms.tolist() == sorted(ms for o, ms in mine.items() if first <= o < until)
    assert ledger.counts() == {p: n for p in range(3) if (n := sum(q == p for q, _ in known))}


@pytest.mark.parametrize("value", [None, [], {}, {"partition": 0}, {**record(0, 1, 2), "rating": "high"}])
def test_what_is_no_record_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="rating from outside"):
        OutsideRatings().add(value)


# -- what the windows must hold


@hypothesis_settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 500), st.integers(0, 400)), min_size=1, max_size=10),
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(-20_000, 120_000)), max_size=4), min_size=10, max_size=10
    ),
    st.sampled_from([0, 5_000, 20_000]),
)
def test_expected_windows_hold_ratings_from_outside_late_ones_left_out(
    steps: list[tuple[int, int, int]], posts: list[list[tuple[int, int]]], delay_ms: int
) -> None:
    """The same micro-batches for engine and reference; each partition's outside ratings stand behind its own of the batch."""
    ledger, shards = OutsideRatings(), test_truth.replays()
    engine = ExpectedWindows(test_truth.CATALOGUE, test_truth.SPECS, delay_ms, 7, outside=ledger)
    ends, sent, batches, closed = [0, 0, 0], [0, 0, 0], [], {}
    for batch, (step, posted) in enumerate(zip(steps, posts, strict=False)):
        parts = [shards[p].events(sent[p], step[p]) for p in range(3)]
        sent = [n + more for n, more in zip(sent, step, strict=True)]
        ends = [end + more for end, more in zip(ends, step, strict=True)]
        for p, ms in posted:
            ledger.add(record(p, ends[p], test_truth.START_MS + ms))
            ends[p] += 1
        times = np.array([test_truth.START_MS + ms for _, ms in posted], np.int64)
        batches.append(
            Ratings(
                np.concatenate([*(e.movie_ids for e in parts), np.full(len(posted), MOVIE)]),
                np.concatenate([*(e.half_stars / 2 for e in parts), np.full(len(posted), 4.5)]),
                np.concatenate([*(e.timestamps_ms for e in parts), times]),
            )
        )
        said = {str(p): {"valid": ends[p], "next_offset": ends[p]} for p in range(3)}
        cut = Cut.from_record({"batch": batch, "partitions": said}, ledger)
        assert cut.read == dict(enumerate(sent))
        engine.advance(cut, shards)
        closed.update(engine.close())
    found = {**closed, **{window: engine.record(window) for window in engine.open}}
    for kind, spec in enumerate(test_truth.SPECS):
        truth = reference(batches, spec.size_ms, spec.slide_ms, delay_ms)
        assert {end - spec.size_ms for k, end in found if k == kind} == set(truth.windows)
        assert sum(n for (k, _), n in engine.late.items() if k == kind) == truth.late
        for start, window in truth.windows.items():
            one = found[kind, start + spec.size_ms]
            assert (one["count"], one["histogram"]) == (window.count, window.histogram())
            assert [(m["movieId"], m["count"], m["avg_rating"]) for m in one["movies"]] == window.top(7)
    tumbling = [one for (kind, _), one in found.items() if kind == 0]
    assert sum(one["outside"] for one in tumbling) <= sum(map(len, posts[: len(steps)]))


# -- the audit


def test_the_audit_counts_them_apart_and_only_as_they_were_written() -> None:
    ledger, records = OutsideRatings(), list(test_audit.RECORDS[: test_audit.COUNT])
    for place in (0, 7, 8, 1500, test_audit.COUNT):
        said = record(1, place, test_audit.START_MS + 5, userId=7 + place)
        events = EventBatch(
            1, 0, *(np.array([said[name]], np.int64) for name in ("userId", "movieId")),
            np.array([9], np.uint8), np.array([said["timestamp"]], np.int64),
        )  # fmt: skip
        records.insert(place, (encode_keys(events)[0], encode_values(events)[0]))
        ledger.add(said)

    def audited() -> Any:
        audit = PartitionAudit(test_audit.replay(), test_audit.COUNT, is_outside=lambda *found: ledger.holds(1, *found))
        audit.take([k for k, _ in records], [v for _, v in records], lambda n: n)
        return audit.finish()

    verdict = audited()
    assert verdict.agreed and (verdict.found, verdict.outside) == (test_audit.COUNT, 5)
    records[7] = test_audit.changed(records[7], rating=1.0)  # no longer what the ledger says
    records.insert(20, records[0])  # nor is this one at its place
    verdict = audited()
    assert verdict.counts == test_audit.counts(foreign=2 + 2)  # and the two behind it have moved
    assert verdict.outside == 2


# -- health


def reading(read: int, posted: list[int], lost: int = 0) -> dict[str, Any]:
    """The job's record after so many of the shard's ratings and some from outside."""
    newest = [int(test_metrics.shard_progress(read)["event_time_ms"]), *posted]
    total = read + len(posted) - lost
    return test_metrics.job(
        partitions={"0": {"records": total, "next_offset": read + 100, "max_event_ms": max(newest)}}
    )


def healthy_store() -> MetricsStore:
    store, now = MetricsStore((test_metrics.TUMBLING,)), test_metrics.NOW
    store.kafka_connected = True
    store.progress("generator", test_metrics.generator(), now)
    store.progress("shard/0", test_metrics.shard_progress(120), now)
    store.expected("oracle", {"state": "running", "batch": 3, "updated_ms": now}, now)
    return store


@pytest.mark.parametrize("ahead_ms", [-50_000, -1, 0, 4_000])
def test_ratings_from_outside_do_not_turn_health_red_and_hide_nothing(ahead_ms: int) -> None:
    store, now = healthy_store(), test_metrics.NOW
    own_ms = int(test_metrics.shard_progress(100)["event_time_ms"])
    posted = [own_ms + ahead_ms, own_ms - 40_000]
    store.job(reading(100, posted), now)
    for at, ms in enumerate(posted):
        store.posted(record(0, 3 + at, ms), now)
    assert store.health(now + 9_000).status == "healthy"
    # the same numbers with a rating of the shard less: seen as soon as one of its own is the newest
    later = [ms for ms in posted if ms < int(test_metrics.shard_progress(119)["event_time_ms"])]
    store.job(reading(119, later, lost=1) | {"batch": 4}, now)
    reasons = " ".join(store.health(now + 10_001).reasons)
    assert ("1 ratings that were sent have not been read" in reasons) == (len(later) == 2)
    assert store.verification(now)["outside"] == 2 and store.outside() == {"0": 2}


def test_without_a_record_of_them_they_are_records_that_nobody_sent() -> None:
    store, now = healthy_store(), test_metrics.NOW
    store.job(reading(100, [int(test_metrics.shard_progress(50)["event_time_ms"])]), now)
    assert "1 records that no shard sent" in store.health(now + 10_001).reasons[0]


# -- over HTTP


class Delivery:
    """Keeps what is delivered; fails as often as it is told to."""

    def __init__(self, failures: int = 0, error: Exception | None = None) -> None:
        self.failures = failures
        self.error = error or DeliveryError(problem="the broker is away")
        self.closed = 0
        self.values: list[bytes] = []
        self.go = threading.Event()
        self.go.set()

    def deliver(self, batch: EventBatch) -> None:
        assert self.go.wait(20)
        if self.failures:
            self.failures -= 1
            raise self.error
        self.values += encode_values(batch)

    def close(self) -> None:
        self.closed += 1


RATING = {"userId": 116483, "movieId": 5, "rating": 3.0, "timestamp": NOW - 5}


def client_of(delivery: Delivery, host: str = "127.0.0.1") -> tuple[TestClient, OutsideQueue]:
    queue = OutsideQueue(lambda: delivery)
    return test_serving.make(host=host, outside=queue)[0], queue


def test_one_or_many_are_accepted_and_written_in_the_contracts_form() -> None:
    delivery = Delivery()
    client, queue = client_of(delivery)
    assert client.post("/ratings", json=RATING).json() == {"accepted": 1}
    untimed = {name: value for name, value in RATING.items() if name != "timestamp"}
    answer = client.post("/ratings", json=[{**untimed, "rating": 5}, RATING])
    assert (answer.status_code, answer.json()) == (202, {"accepted": 2})
    queue.close()
    form = b'{"userId":116483,"movieId":5,"rating":%s,"timestamp":%d}'
    assert delivery.values == [form % row for row in ((b"3.0", NOW - 5), (b"5.0", NOW), (b"3.0", NOW - 5))]
    found = client.get("/ratings/outside").json()
    assert found == {"total": 0, "partitions": {}, "posted": {"waiting": 0, "delivered": 3, "lost": 0}}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([RATING, {**RATING, "rating": 3.3}], "rating 1: rating is not one of"),
        ({**RATING, "userId": 0}, "rating 0: userId, movieId and timestamp must be whole numbers above 0"),
        ({**RATING, "userId": 2**60}, "userId must be below"),
        ({**RATING, "movieId": 10**7}, "movieId 10000000 is not in the catalogue"),
        ({**RATING, "timestamp": NOW + 6_000}, "timestamp is more than 5 s ahead of the event clock"),
        ({**RATING, "stars": 3}, "field 'stars' is unknown"),
        ({"userId": 5}, "movieId is missing"),
        ([], None),
        ("text", "not a JSON object"),
        ([RATING] * 10_001, "10,000 at most"),
    ],
)
def test_an_invalid_rating_has_the_whole_request_refused(body: Any, reason: str | None) -> None:
    client, queue = client_of(Delivery())
    answer = client.post("/ratings", json=body)
    assert answer.status_code == (202 if reason is None else 422)
    assert reason is None or reason in answer.json()["error"]
    assert queue.waiting() == 0 and queue.delivered == 0


def test_they_pass_the_same_gate_as_control_and_a_full_queue_says_so() -> None:
    delivery = Delivery()
    delivery.go.clear()
    client, queue = client_of(delivery, host="10.0.0.9")
    assert client.post("/ratings", json=RATING).status_code == 401
    bearer = {"Authorization": f"Bearer {test_serving.TOKEN}"}
    assert client.post("/ratings", json=[RATING] * 10_000, headers=bearer).status_code == 202
    assert client.post("/ratings", json=[RATING] * 10_000, headers=bearer).status_code == 202
    answer = client.post("/ratings", json=RATING, headers=bearer)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1" and "20,000 at most" in answer.text
    delivery.go.set()
    wait_for("all", lambda: queue.delivered == 20_000, 20)
    assert client.post("/ratings", json=RATING, headers=bearer).status_code == 202
    queue.close()


def test_what_fails_is_tried_again_and_given_up_with_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside_module, "_BACKOFF_S", 0.01)
    delivery = Delivery(failures=3)
    queue = OutsideQueue(lambda: delivery)
    queue.put([RATING])
    wait_for("delivery", lambda: queue.delivered == 1, 20)
    assert json.loads(delivery.values[0]) == RATING and queue.lost == 0
    monkeypatch.setattr(outside_module, "_TRY_FOR_S", 0.0)
    delivery.failures = 1
    queue.put([RATING, RATING])
    wait_for("giving up", lambda: queue.lost == 2, 20)
    assert queue.waiting() == 0 and len(delivery.values) == 1
    with pytest.raises(QueueFull):
        queue.put([RATING] * 20_001)
    queue.close()


@pytest.mark.parametrize("error", [BufferError("Local: Queue full"), KeyError("rating"), OSError("no such file")])
def test_what_is_no_error_of_ours_is_a_delivery_that_failed_and_ends_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside_module, "_BACKOFF_S", 0.01)
    delivery = Delivery(failures=1, error=error)
    queue = OutsideQueue(lambda: delivery)
    for _ in range(2):
        queue.put([RATING])
    wait_for("both", lambda: queue.delivered == 2, 20)
    assert queue.lost == queue.waiting() == 0 and delivery.closed == 1 and queue._thread is not None
    monkeypatch.setattr(outside_module, "_TRY_FOR_S", 0.0)
    delivery.failures = 1
    queue.put([RATING, RATING])
    wait_for("giving up", lambda: queue.lost == 2, 20)
    assert queue._thread.is_alive()
    queue.close()


def test_a_delivery_that_cannot_be_made_at_first_is_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema registry may be away when the first ratings come."""
    monkeypatch.setattr(outside_module, "_BACKOFF_S", 0.01)
    delivery, away = Delivery(), [OSError("no route"), DeliveryError(problem="the registry is away")]

    def opened() -> Delivery:
        if away:
            raise away.pop()
        return delivery

    queue = OutsideQueue(opened)
    queue.put([RATING])
    wait_for("delivery", lambda: queue.delivered == 1, 20)
    assert len(delivery.values) == 1 and queue.lost == 0
    queue.close()


class Broker:
    """A broker, and the producer that writes there; what it answers may get lost, and commits may be kept in part.

    Attributes:
        answers: what the next commits end with, though they are done.
        unread: what the next readings end with.
        forgotten: where, by topic and partition, the next commits are not ended, though they were answered: it is killed in them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, partitions: int = 1) -> None:
        self.answers: list[Exception] = []
        self.unread: list[Exception] = []
        self.forgotten: list[set[tuple[str, int]]] = []
        self._partitions = partitions
        self._logs: dict[tuple[str, int], list[bytes | None]] = {}  # None = it was aborted
        self._open: dict[tuple[str, int], int] = {}  # where the first open transaction of a place begins
        self._written: set[tuple[str, int]] = set()
        for name in ("make_producer", "read_topic_from", "held_up", "wait_until_seen"):
            monkeypatch.setattr(delivery_module, name, getattr(self, name))

    def seen(self, topic: str) -> dict[tuple[int, int], bytes]:
        """What readers see of a topic, by partition and offset."""
        places = [place for place in sorted(self._logs) if place[0] == topic]
        logs = {place[1]: self._logs[place][: self._open.get(place)] for place in places}
        return {(p, offset): v for p, log in logs.items() for offset, v in enumerate(log) if v is not None}

    def make_producer(self, *_: Any, **__: Any) -> Broker:
        return self

    def read_topic_from(self, _: str, topic: str, partition: int, offset: int, timeout_s: float) -> Any:
        if self.unread:
            raise self.unread.pop(0)
        self.wait_until_seen("", topic)
        found = [(n, value) for (p, n), value in self.seen(topic).items() if p == partition and n >= offset]
        return iter([Record(topic, partition, n, None, value, 0) for n, value in found])

    def held_up(self, _: str, topic: str) -> list[int]:
        return [partition for name, partition in self._open if name == topic]

    def wait_until_seen(self, _: str, topic: str, *__: Any) -> None:
        if self.held_up("", topic):
            raise BrokerUnavailableError(problem="a transaction has been open for 30 s")

    def init_transactions(self, _: float) -> None: ...

    def begin_transaction(self) -> None:
        self._written = set()

    def produce(self, topic: str, value: bytes, key: bytes, partition: int, on_delivery: Any = None) -> None:
        place = (topic, int(key) % self._partitions if partition < 0 else partition)
        log = self._logs.setdefault(place, [])
        self._open.setdefault(place, len(log))
        self._written.add(place)
        log.append(value)
        if on_delivery is not None:
            on_delivery(None, SimpleNamespace(partition=lambda: place[1], offset=lambda: len(log) - 1))

    def flush(self, _: float) -> int:
        return 0

    def commit_transaction(self, _: float) -> None:
        for place in self._written - (self.forgotten.pop(0) if self.forgotten else set()):
            del self._open[place]
        self._written = set()
        if self.answers:
            raise self.answers.pop(0)

    def abort_transaction(self, _: float) -> None:
        for place in self._written:
            first = self._open.pop(place)
            self._logs[place][first:] = [None] * len(self._logs[place][first:])
        self._written = set()

    def purge(self) -> None: ...

    def poll(self, _: float) -> None: ...


def test_no_rating_is_written_twice_though_the_broker_is_away_when_it_is_asked_for_the_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = Broker(monkeypatch)
    broker.answers = [KafkaException(KafkaError(KafkaError._TIMED_OUT))]
    broker.unread = [
        BrokerUnavailableError(problem="nobody answers"),
        KafkaException(KafkaError(KafkaError._TRANSPORT)),
    ]
    delivery, batch = OutsideDelivery("", "ratings", "outside"), test_audit.replay().events(0, 3)
    for _ in range(3):
        with pytest.raises(DeliveryError):
            delivery.deliver(batch)
    delivery.deliver(batch)
    assert list(broker.seen("ratings").values()) == encode_values(batch) and len(broker.seen("outside")) == 3


def test_a_commit_in_doubt_says_nothing_of_other_ratings(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker(monkeypatch)
    broker.answers = [KafkaException(KafkaError(KafkaError._TIMED_OUT))]
    delivery, replay = OutsideDelivery("", "ratings", "outside"), test_audit.replay()
    with pytest.raises(DeliveryError):  # and is given up
        delivery.deliver(replay.events(0, 3))
    delivery.deliver(replay.events(3, 2))
    assert list(broker.seen("ratings").values()) == encode_values(replay.events(0, 5))


class Slow(Broker):
    """Its producer's queue has room for three records, and more only when it is served."""

    queued = 0
    answers_come = True

    def produce(self, topic: str, value: bytes, key: bytes, partition: int, on_delivery: Any = None) -> None:
        if self.queued == 3:
            raise BufferError("Local: Queue full")
        self.queued += 1
        super().produce(topic, value, key, partition, on_delivery)

    def poll(self, _: float) -> None:
        self.queued = 0 if self.answers_come else self.queued

    def purge(self) -> None:
        self.queued = 0


def test_ratings_that_a_full_queue_has_no_room_for_wait_until_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Slow(monkeypatch)
    OutsideDelivery("", "ratings", "outside").deliver(test_audit.replay().events(0, 10))
    assert list(broker.seen("ratings").values()) == encode_values(test_audit.replay().events(0, 10))
    assert unowned(broker) == ([], 0)


def test_a_queue_that_stays_full_is_a_delivery_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "_DEADLINE_S", 0.0)
    broker, batch = Slow(monkeypatch), test_audit.replay().events(0, 10)
    broker.answers_come = False
    delivery = OutsideDelivery("", "ratings", "outside")
    with pytest.raises(DeliveryError, match="the queue stayed full"):
        delivery.deliver(batch)
    broker.answers_come = True
    monkeypatch.setattr(delivery_module, "_DEADLINE_S", 30.0)
    delivery.deliver(batch)
    assert list(broker.seen("ratings").values()) == encode_values(batch) and unowned(broker) == ([], 0)


def delivered(delivery: OutsideDelivery, batch: EventBatch) -> None:
    """Tried again until it is done, as the queue does."""
    for _ in range(9):
        try:
            return delivery.deliver(batch)
        except DeliveryError:
            continue
    raise AssertionError("it is never done")


def unowned(broker: Broker) -> tuple[list[bytes], int]:
    """Ratings without a record that says where they stand, and how many records say so of what is not there."""
    ratings, ledger = broker.seen("ratings"), OutsideRatings()
    for value in broker.seen("outside").values():
        ledger.add(json.loads(value))
    places = [place for place in ratings if ledger.before(*place) < ledger.before(place[0], place[1] + 1)]
    return [v for place, v in ratings.items() if place not in places], sum(ledger.counts().values()) - len(places)


PLACES = [("ratings", 0), ("ratings", 1), ("outside", 0)]


@given(st.lists(st.sets(st.sampled_from(PLACES)), max_size=4))
@example([{("outside", 0)}])
@example([{("ratings", 0)}])
def test_a_rating_of_a_commit_that_was_kept_in_part_is_there_once_with_its_record(
    forgotten: list[set[tuple[str, int]]],
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        broker = Broker(monkeypatch, partitions=2)
        broker.forgotten = list(forgotten)
        delivery, batch = OutsideDelivery("", "ratings", "outside"), test_audit.replay().events(0, 6)
        delivered(delivery, batch)
        assert sorted(broker.seen("ratings").values()) == sorted(v for v in encode_values(batch) if v)
        without, too_many = unowned(broker)
        assert without == []
        # a record that was kept without its rating cannot be taken back: the oracle sees that such a rating is missing
        assert too_many == 0 or any(("outside", 0) not in places and places for places in forgotten)
        broker.forgotten = []
        delivered(delivery, test_audit.replay().events(6, 1))
        assert len(broker.seen("ratings")) == 7 and unowned(broker) == ([], too_many)


def test_who_waits_for_the_records_of_ratings_that_are_there_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of the ledger wait up to where it ended when they began, which is before the records are written again."""
    broker = Broker(monkeypatch, partitions=2)
    broker.forgotten = [{("outside", 0)}, {("outside", 0)}]
    delivered(OutsideDelivery("", "ratings", "outside"), test_audit.replay().events(0, 6))
    records = list(broker.seen("outside").values())
    assert len(records) == 18 and records[:6] == records[6:12] == records[12:]
    assert unowned(broker) == ([], 0)


def test_ratings_that_were_given_up_and_are_there_in_part_have_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    broker, replay = Broker(monkeypatch, partitions=2), test_audit.replay()
    broker.forgotten = [{("ratings", 1), ("outside", 0)}, {("outside", 0)}]
    delivery, given_up = OutsideDelivery("", "ratings", "outside"), replay.events(0, 6)
    with pytest.raises(DeliveryError):
        delivery.deliver(given_up)
    delivered(delivery, replay.events(6, 2))
    kept = [
        value for key, value in zip(encode_keys(given_up), encode_values(given_up), strict=True) if not int(key) % 2
    ]
    assert 0 < len(kept) < 6
    assert sorted(broker.seen("ratings").values()) == sorted([*kept, *encode_values(replay.events(6, 2))])
    assert unowned(broker) == ([], 0)


@pytest.mark.parametrize(("posted_before", "counted"), [(0, 12), (5, 7)])
def test_a_runs_summary_counts_what_was_posted_in_it_and_not_what_was_before(
    posted_before: int, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(load_settings())
    pipeline._posted_before = posted_before
    pipeline._processing = SimpleNamespace(status={"counted": 22, "late_dropped": 0, "rejected": 0})
    totals = SimpleNamespace(delivered=5, base=10)
    pipeline._generator = SimpleNamespace(totals=lambda: totals, coordinator=SimpleNamespace(requested=5))
    monkeypatch.setattr(pipeline, "_count_windows", lambda _: 1)
    assert pipeline._summarize().counted == counted
