"""API, gate and page fragments, without servers."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from ray_pipeline.__main__ import app
from ray_pipeline.clock import FakeClock
from ray_pipeline.command import checking
from ray_pipeline.command import running as commands
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.errors import (
    BrokerUnavailableError,
    CatalogueError,
    ConfigurationError,
    EnvironmentProblem,
    RayPipelineError,
    StateMismatchError,
    UncheckedError,
)
from ray_pipeline.events import EventBatch
from ray_pipeline.kafka.read import Record
from ray_pipeline.metrics.health import Health
from ray_pipeline.metrics.records import read_score
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.rates.language import parse_plan
from ray_pipeline.serving import api as api_module
from ray_pipeline.serving import feed as feed_module
from ray_pipeline.serving import views
from ray_pipeline.serving.api import make_api
from ray_pipeline.serving.gate import ControlGate, Refused
from ray_pipeline.serving.outside import OutsideQueue
from ray_pipeline.serving.predictions import QueueFull
from ray_pipeline.serving.reach import told, url_of
from ray_pipeline.truth.explain import explain
from ray_pipeline.truth.replay import ShardReplay, build_models
from ray_pipeline.truth.scoring import Prediction
from ray_pipeline.verification import explain as explaining
from ray_pipeline.windows.spec import iso_ms, window_specs

NOW = 1_700_000_040_000
TYPES = ("tumbling_1min", "sliding_5min_1min")
TOKEN = "a-token-of-some-length"


class Feed:
    def tail(self, count: int) -> list[Record]:
        return [Record("ratings", 1, 7, "5", b'{"userId":5}', NOW)][:count]


class Control:
    def __init__(self) -> None:
        self.sent: list[tuple[str, float | str | None]] = []
        self.error: Exception | None = None

    def send(
        self, command: str, rate: float | None = None, actors: int | None = None, plan: str | None = None
    ) -> tuple[str, bool]:
        if self.error is not None:
            raise self.error
        self.sent.append((command, next((value for value in (rate, actors, plan) if value is not None), None)))
        return "id", True


class Explanations:
    """Knows one rating."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def by_index(self, partition: int, index: int) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        if partition > 3:
            raise UncheckedError(
                problem=f"partition {partition} has no ratings of this run", fix="The partitions are: 0"
            )
        return {"partition": partition, "index": index}

    def by_offset(self, partition: int, offset: int) -> dict[str, Any]:
        return {"partition": partition, "index": offset - 1}


class Predictions:
    def __init__(self) -> None:
        self.taken: list[Prediction] = []
        self.full = False
        self.lost = 0

    def put(self, predictions: list[Prediction]) -> None:
        if self.full:
            raise QueueFull("50,000 predictions wait")
        self.taken += predictions

    def waiting(self) -> int:
        return len(self.taken)


class RefusingDelivery:
    """Nothing is to be written."""

    def deliver(self, batch: EventBatch) -> None:
        raise AssertionError("nothing was accepted")

    def close(self) -> None:
        """Nothing is held."""


def make(
    store: MetricsStore | None = None,
    host: str = "127.0.0.1",
    predictions: Predictions | None = None,
    outside: OutsideQueue | None = None,
    clock: FakeClock | None = None,
    explanations: Explanations | None = None,
) -> tuple[TestClient, Control]:
    catalogue = load_catalogue(load_settings(movies=50))
    control = Control()
    app = make_api(
        store or MetricsStore(TYPES),
        catalogue,
        Feed(),
        control,
        ControlGate(TOKEN, (8000, 8501)),
        explanations or Explanations(),  # type: ignore[arg-type]
        100,
        clock or FakeClock(NOW),
        predictions or Predictions(),  # type: ignore[arg-type]
        outside=outside or OutsideQueue(RefusingDelivery),
    )
    client = TestClient(app, base_url="http://127.0.0.1:8000", client=(host, 5), raise_server_exceptions=False)
    return client, control


def filled() -> MetricsStore:
    store = MetricsStore(TYPES)
    for kind, size in zip(TYPES, (60_000, 300_000), strict=True):
        for step in range(3):
            start = NOW + step * 60_000
            head = {
                "window_start": iso_ms(start),
                "window_end": iso_ms(start + size),
                "window_type": kind,
                "count": 10 + step,
                "avg_rating": 3.5,
                "updated_ms": NOW,
            }
            movies = [{"movieId": m, "count": 30 - m, "avg_rating": 3.0} for m in range(1, 21)]
            histogram = {"p50": 3.5, "p95": 5.0, "histogram": [1] * 10}
            store.window({**head, "kind": "total", **histogram})
            store.window({**head, "kind": "topn", "movies": movies})
            store.window({**head, "kind": "genres", "genres": [{"genre": "Drama", "count": 3, "avg_rating": 3.0}]})
    return store


@pytest.mark.parametrize("path", ["summary", "topn", "genres", "history", "topn?limit=5&window_type=sliding_5min_1min"])
def test_an_empty_pipeline_answers_200_and_no_data_yet(path: str) -> None:
    answer = make()[0].get(f"/metrics/{path}")
    assert answer.status_code == 200 and answer.json()["status"] == "no data yet"


def test_health_of_an_empty_pipeline() -> None:
    answer = make()[0].get("/metrics/health")
    assert answer.status_code == 200
    found = answer.json()
    assert found["status"] == "unhealthy" and found["kafka_connected"] is False and found["last_update"] is None


def test_topn_has_titles_counts_means_and_a_limit() -> None:
    client, _ = make(filled())
    movies = client.get("/metrics/topn?limit=3").json()["movies"]
    assert [(m["rank"], m["movieId"], m["count"]) for m in movies] == [(1, 1, 29), (2, 2, 28), (3, 3, 27)]
    assert all(m["title"] and m["avg_rating"] == 3.0 for m in movies)
    assert len(client.get("/metrics/topn").json()["movies"]) == 10
    older = client.get("/metrics/topn", params={"window_start": iso_ms(NOW)}).json()
    assert older["window_start"] == iso_ms(NOW) and older["count"] == 10


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("topn?limit=0", "limit"),
        ("topn?limit=101", "limit"),
        ("topn?limit=ten", "limit"),
        ("topn?window_type=weekly", "tumbling_1min"),
        ("history?from=yesterday", "ISO-8601"),
        ("history?from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z", "after from"),
        ("history?format=xml", "format"),
    ],
)
def test_bad_questions_get_json_with_a_reason(path: str, reason: str) -> None:
    answer = make(filled())[0].get(f"/metrics/{path}")
    assert answer.status_code == 422 and reason in answer.json()["error"]


def test_an_unknown_path_is_json_too() -> None:
    answer = make()[0].get("/metrics/none")
    assert answer.status_code == 404 and "error" in answer.json()


def test_history_by_time_and_as_csv() -> None:
    client, _ = make(filled())
    bounds = {"from": iso_ms(NOW + 60_000), "to": "2023-11-14T22:16:00+00:00"}
    assert [w["count"] for w in client.get("/metrics/history", params=bounds).json()["windows"]] == [11]
    rows = list(csv.DictReader(io.StringIO(client.get("/metrics/history?format=csv").text)))
    assert [row["count"] for row in rows] == ["10", "11", "12"] and rows[0]["window_type"] == "tumbling_1min"


def test_prometheus_text() -> None:
    text = make(filled())[0].get("/metrics").text
    assert 'ray_pipeline_window_count{window_type="tumbling_1min"} 12.0' in text
    assert 'ray_pipeline_health{state="unhealthy"} 1.0' in text


def test_the_docs_need_no_other_host() -> None:
    client, _ = make()
    page = client.get("/docs").text
    assert "://" not in page.replace("http://www.w3.org", "")
    asset = next(part.split('"')[0] for part in page.split('src="')[1:])
    assert client.get(asset).status_code == 200
    assert "/metrics/topn" in client.get("/openapi.json").json()["paths"]


def test_control_from_this_machine_needs_no_token() -> None:
    client, control = make()
    assert client.post("/control/rate", json={"rate": 0.2}).json() == {
        "id": "id",
        "command": "rate",
        "applied": True,
        "rate": 0.2,
    }
    assert client.post("/control/pause").status_code == client.post("/control/resume").status_code == 200
    assert control.sent == [("rate", 0.2), ("pause", None), ("resume", None)]


@pytest.mark.parametrize("body", [{"rate": 0}, {"rate": -1}, {"rate": "fast"}, {}, {"rate": 1e12}])
def test_a_bad_rate_is_refused(body: dict[str, Any]) -> None:
    client, control = make()
    answer = client.post("/control/rate", json=body)
    assert answer.status_code == 422 and "rate" in answer.json()["error"] and control.sent == []


def test_the_number_of_actors_is_changed_or_refused_with_the_generators_reason() -> None:
    client, control = make()
    answer = client.post("/control/scale", json={"actors": 3})
    assert answer.json() == {"id": "id", "command": "scale", "applied": True, "actors": 3}
    assert client.post("/control/scale", json={"actors": 0}).status_code == 422
    assert client.post("/control/scale", json={"actors": 1.5}).status_code == 422
    assert control.sent == [("scale", 3)]
    control.error = ConfigurationError(problem="9 actors cannot share 4 partitions")
    answer = client.post("/control/scale", json={"actors": 9})
    assert answer.status_code == 409 and "4 partitions" in answer.json()["error"]


def test_control_from_another_machine_needs_the_token() -> None:
    client, control = make(host="10.0.0.9")
    assert client.post("/control/pause").status_code == 401
    assert client.post("/control/pause", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.post("/control/pause", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.post("/control/pause", headers={"X-Control-Token": TOKEN}).status_code == 200
    assert len(control.sent) == 2


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "http://127.0.0.1:99999"}, 403),
        ({"Origin": "http://127.0.0.1:abc"}, 403),
        ({"Host": "["}, 403),
        ({"Host": "127.0.0.1:abc", "Authorization": f"Bearer {TOKEN}"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, 403),
        ({"Origin": "http://evil.example", "Authorization": f"Bearer {TOKEN}"}, 403),
        ({"Origin": "http://localhost:8501"}, 200),
        ({"Origin": "http://127.0.0.1:8000"}, 200),
    ],
)
def test_cross_site_requests_are_refused(headers: dict[str, str], status: int) -> None:
    client, control = make()
    assert client.post("/control/pause", headers=headers).status_code == status
    assert len(control.sent) == (status == 200)


def test_a_missing_broker_is_503_with_a_reason() -> None:
    client, control = make()
    control.error = BrokerUnavailableError(problem="no broker", fix="")
    answer = client.post("/control/pause")
    assert answer.status_code == 503 and answer.json() == {"error": "no broker"}
    control.error = RuntimeError("boom")
    assert make_error(client) == 500


def make_error(client: TestClient) -> int:
    answer = client.post("/control/pause")
    assert "RuntimeError" in answer.json()["error"]
    return answer.status_code


def test_a_gate_compares_names_and_ports() -> None:
    gate = ControlGate(TOKEN, (8000,))
    gate.check("::1", "[::1]:8000", "http://[::1]:8000", None)
    gate.check("10.0.0.9", "host.example:8000", "http://host.example:8000", TOKEN)
    with pytest.raises(Refused, match="not this machine"):
        gate.check("127.0.0.1", None, None, None)


def test_the_tail_is_as_long_as_was_asked_for_whoever_else_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Latest:
        def __init__(self, _: str, __: str, most_partitions: int = 0) -> None:
            self.partitions = most_partitions

        def read(self, count: int) -> list[Record]:
            asked.append(count)
            return [Record("ratings", 0, n, "5", b"{}", NOW + n) for n in range(1_000)][-count:]

    monkeypatch.setattr(feed_module, "LatestRecords", Latest)
    store, clock = MetricsStore(TYPES), FakeClock(NOW)
    store.kafka_connected = True
    feed = feed_module.Feed(load_settings(), "nowhere:1", store, clock)
    for _ in range(5):
        for count in (8, 100, 8, 50, 20):
            assert [record.offset for record in feed.tail(count)] == list(range(999, 999 - count, -1))
    assert asked == [20, 100]
    clock.advance(1.0)
    assert len(feed.tail(8)) == 8 and len(feed.tail(21)) == 21 and asked == [20, 100, 20, 100]


def test_the_stream_shows_that_everything_has_fallen_silent() -> None:
    store, clock = MetricsStore(TYPES), FakeClock(NOW)
    store.kafka_connected = True
    job = {"state": "running", "batch": 3, "partitions": {}, "executors": 1, "executors_wanted": 1}

    def stages(now_ms: int) -> None:
        store.progress("generator", {"state": "running", "updated_ms": now_ms}, now_ms)
        sent, epochs = (now_ms - NOW) // 10 + 9_000, (Epoch(NOW - 60_000, 100.0),)
        shard = ShardProgress("r", "c", 0, sent, now_ms, now_ms, epochs, 1.0, 0.5)
        store.progress("shard/0", json.loads(shard.to_json()), now_ms)
        store.job({**job, "updated_ms": now_ms}, now_ms)
        store.expected("oracle", {"state": "running", "batch": 3, "updated_ms": now_ms}, now_ms)

    async def sleep(seconds: float) -> None:
        clock.advance(seconds)
        if clock.now_ms() <= NOW + 3_000:
            stages(clock.now_ms())

    async def is_disconnected() -> bool:
        return clock.now_ms() > NOW + 30_000

    async def events() -> list[tuple[int, dict[str, Any]]]:
        found = []
        for second in range(-10, 1):
            stages(NOW + second * 1_000)
        asked: Any = SimpleNamespace(is_disconnected=is_disconnected)
        async for text in api_module._events(store, clock, asked, None):
            if not text.startswith(":"):
                kind, _, data = text.strip().split("\n")
                assert kind == "event: summary"
                found.append((clock.now_ms() - NOW, json.loads(data.removeprefix("data: "))))
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(api_module.asyncio, "sleep", sleep)
        found = asyncio.run(events())
    assert [at_ms for at_ms, _ in found] == [0, 1000, 2000, 3000, 8000, 13000, 18000, 23000, 28000]
    assert [event["generator"]["delivered_rate"] for _, event in found] == [100.0] * 4 + [0.0] * 5
    fine, silent = ({"status": "healthy", "reasons": [], "stale_since": None}, iso_ms(NOW + 3_000))
    assert [event["health"] for _, event in found[:6]] == [fine] * 6
    assert all((e["health"]["status"], e["health"]["stale_since"]) == ("degraded", silent) for _, e in found[6:])
    assert {**found[-1][1], "health": None}.keys() == {**store.summary(NOW), "health": None}.keys()


def running() -> MetricsStore:
    store = MetricsStore(TYPES)
    store.progress("run", {"run": "r", "config": "c", "settings": {}}, NOW)
    return store


def test_a_rating_is_explained_by_its_index_or_its_offset() -> None:
    client, _ = make(running())
    assert client.get("/events/2/41").json() == {"partition": 2, "index": 41}
    assert client.get("/records/2/42").json() == {"partition": 2, "index": 41}
    missing = client.get("/events/9/0")
    assert missing.status_code == 404 and "partition 9" in missing.json()["error"]
    assert client.get("/events/x/0").status_code == 422


@pytest.mark.parametrize("path", ["records/0/9223372036854775808", f"events/0/{2**63}", "events/0/-1", "records/-1/0"])
def test_a_place_that_cannot_be_is_refused(path: str) -> None:
    answer = make(running())[0].get(f"/{path}")
    assert answer.status_code == 422 and "should be" in answer.json()["error"]


def test_a_rating_of_a_pipeline_that_has_none_yet_is_no_data_yet() -> None:
    client, _ = make(explanations=Explanations(UncheckedError(problem="no record of a run", fix="")))
    answer = client.get("/events/0/0")
    assert answer.status_code == 200 and answer.json()["status"] == "no data yet"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StateMismatchError(problem="another catalogue", fix="Give it with --catalog"), 409),
        (CatalogueError(problem="line 3 is malformed", fix=""), 409),
        (BrokerUnavailableError(problem="no broker answers", fix=""), 503),
        (EnvironmentProblem(problem="no room", fix=""), 503),
        (UncheckedError(problem="no such partition", fix=""), 404),
    ],
)
def test_a_known_error_is_told_with_its_reason(error: RayPipelineError, status: int) -> None:
    answer = make(running(), explanations=Explanations(error))[0].get("/events/0/0")
    assert answer.status_code == status and answer.json() == {"error": str(error)}


# -- scoreboard


def score(model: str, rmse: float) -> dict[str, Any]:
    def errors(value: float) -> dict[str, Any]:
        return {against: {"rmse": value, "mae": value * 0.8} for against in ("observed", "truth")}

    return {
        "model": model,
        "matched": 1234,
        "unmatched": 5,
        "scored": 1239,
        "repeated": 7,
        "coverage": 0.5,
        **errors(rmse),
        "floor": errors(0.58),
        "bias_only": errors(0.83),
        "global_mean": errors(1.02),
    }


def scored() -> MetricsStore:
    store = MetricsStore(TYPES)
    store.score("worse", score("worse", 0.9))
    store.score("better", score("better", 0.7))
    store.score("better", score("better", 0.6))
    store.score("", {"records": 20, "rejected": {"not JSON": 3}})
    return store


PREDICTION = {"userId": 1, "movieId": 2, "prediction": 3.5, "timestamp": NOW}


def test_scores_best_first_with_what_was_rejected() -> None:
    assert make()[0].get("/predictions/scores").json()["status"] == "no data yet"
    found = make(scored())[0].get("/predictions/scores").json()
    assert found["status"] == "ok" and found["rejected"] == {"not JSON": 3} and found["records"] == 20
    assert [(m["model"], m["truth"]["rmse"]) for m in found["models"]] == [("better", 0.6), ("worse", 0.9)]
    assert (found["state"], found["reason"]) == (None, None)  # written before a feed said how it stands
    text = make(scored())[0].get("/metrics").text
    assert 'ray_pipeline_prediction_rmse{against="truth",model="better",predictor="floor"} 0.58' in text
    assert 'ray_pipeline_prediction_rmse{against="observed",model="worse",predictor="model"} 0.9' in text


def test_a_scoreboard_that_has_failed_says_so_with_its_reason() -> None:
    store = scored()
    record = {"records": 20, "rejected": {}, "state": "failed", "reason": "<another> catalogue", "updated_ms": NOW}
    store.score("", read_score("", json.dumps(record).encode()))
    found = make(store)[0].get("/predictions/scores").json()
    assert (found["state"], found["reason"]) == ("failed", "<another> catalogue") and len(found["models"]) == 2
    html = views.scoreboard(found["models"], found["reason"])
    assert "no scores any more: &lt;another&gt; catalogue" in html and "0.6000" in html
    assert "no scores any more" in views.scoreboard([], "why") and "no scores any more" not in views.scoreboard([])


def test_predictions_are_accepted_one_or_many() -> None:
    taken = Predictions()
    client, _ = make(predictions=taken)
    answer = client.post("/predictions", json=PREDICTION)
    assert answer.status_code == 202 and answer.json() == {"accepted": 1}
    assert client.post("/predictions", json=[{**PREDICTION, "model": "mine"}] * 3).json() == {"accepted": 3}
    assert taken.taken == [("default", 1, 2, 3.5, NOW)] + [("mine", 1, 2, 3.5, NOW)] * 3
    assert client.get("/predictions/scores").json()["posted"] == {"waiting": 4, "lost": 0}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([PREDICTION, {**PREDICTION, "userId": "1"}], "prediction 1: userId"),
        ({**PREDICTION, "prediction": None}, "prediction 0: prediction"),
        ({}, "prediction 0: userId"),
        ([3], "prediction 0: not a JSON object"),
        ([PREDICTION] * 10_001, "10,000 at most"),
        ("text", "prediction 0: not a JSON object"),
    ],
)
def test_malformed_predictions_are_refused_whole(body: Any, reason: str) -> None:
    taken = Predictions()
    answer = make(predictions=taken)[0].post("/predictions", json=body)
    assert answer.status_code == 422 and reason in answer.json()["error"] and taken.taken == []


def test_what_is_not_finite_or_not_json_is_refused_too() -> None:
    taken = Predictions()
    client, _ = make(predictions=taken)
    for text in ('{"userId":1,"movieId":2,"prediction":NaN,"timestamp":3}', "{"):
        answer = client.post("/predictions", content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422 and answer.json()["error"] and taken.taken == []


def test_predictions_pass_the_same_gate_as_control_and_a_full_queue_says_so() -> None:
    taken = Predictions()
    client, _ = make(host="10.0.0.9", predictions=taken)
    assert client.post("/predictions", json=PREDICTION).status_code == 401
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert client.post("/predictions", json=PREDICTION, headers=bearer).status_code == 202
    assert client.post("/predictions", json=PREDICTION, headers={"Origin": "http://evil.example"}).status_code == 403
    taken.full = True
    answer = client.post("/predictions", json=PREDICTION, headers=bearer)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1" and "wait" in answer.json()["error"]
    assert len(taken.taken) == 1


# -- page fragments


def explained(index: int = 3, **changes: Any) -> dict[str, Any]:
    settings = load_settings(users=50, movies=50, **changes)
    catalogue = load_catalogue(settings)
    plan = (Epoch(NOW, 100.0),)
    progress = ShardProgress("run", "config", 0, 10, NOW, NOW, plan, 0.25, 0.125)
    replay = ShardReplay(build_models(settings, catalogue, [0])[0], progress)
    return explain(replay, index, settings, catalogue, window_specs(settings))


def test_an_explanation_names_drift_scale_and_attack() -> None:
    bomb = "review-bomb movie=7 at=0 ratings=100 intensity=1 stealth=0.5"
    changes = {"drift": ["abrupt at=0 size=-1.25"], "attack": [bomb], "user_scale_sigma": 0.4, "whole_star_share": 1.0}
    found = [explained(index, **changes) for index in range(8)]
    assert {f["attack"]["camouflage"] for f in found} == {True, False} and {f["attack"]["text"] for f in found} == {
        bomb
    }
    for one in found:
        score, kafka = one["score"], {"offset": 3, "value": one["value"], "agrees": True}
        parts = ("mean", "user_bias", "movie_bias", "dot_product", "drift", "noise")
        assert sum(score[name] for name in parts) == pytest.approx(score["raw"], abs=1e-4) and score["drift"] == -1.25
        assert one["user"]["scale"] != 1.0 and one["rounding"]["half_star"] % 1 == 0
        hit = not one["attack"]["camouflage"]
        assert (one["movie"]["movieId"] == 7 and one["rounding"]["rating"] == 1.0) or not hit
        html = views.explanation({**one, "kafka": kafka})
        assert "-1.250 drift" in html and bomb in html


def test_an_explanation_adds_up_and_can_be_read() -> None:
    found = explained()
    score, rounding = found["score"], found["rounding"]
    parts = ("mean", "user_bias", "movie_bias", "dot_product", "noise")
    assert sum(score[name] for name in parts) == pytest.approx(score["raw"], abs=1e-4)
    assert rounding["half_star"] == np.floor(score["raw"] * 2 + 0.5) / 2
    products = [u * m for u, m in zip(found["factors"]["user"], found["factors"]["movie"], strict=True)]
    assert len(products) == 20 and sum(products) == pytest.approx(score["dot_product"], abs=1e-3)
    assert json.loads(found["value"])["rating"] == rounding["rating"]
    assert [w["window_type"] for w in found["windows"]] == [TYPES[0], *[TYPES[1]] * 5]
    assert all(w["window_start"] <= found["time"]["event_time"] < w["window_end"] for w in found["windows"])
    kafka = {"offset": 3, "timestamp_ms": NOW, "key": found["key"], "value": found["value"], "agrees": True}
    html = views.explanation({**found, "kafka": kafka})
    assert found["movie"]["title"].replace("'", "&#x27;") in html and "byte for byte the same" in html
    assert "not there" in views.explanation({**found, "kafka": None})
    other = {**kafka, "agrees": False, "differs": "rating is <b>, must be 2.0"}
    assert "altered: rating is &lt;b&gt;, must be 2.0" in views.explanation({**found, "kafka": other})
    assert score["drift"] == 0 and found["attack"] is None and "drift" not in html and "attack" not in html
    foreign = {"partition": 0, "index": None, "foreign": True, "kafka": {**kafka, "value": "<b>"}}
    assert "somebody else" in views.explanation(foreign)


def test_both_factor_vectors_are_in_what_the_command_prints_and_folded_on_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {**explained(), "kafka": None}
    monkeypatch.setattr(checking, "broker_for_reading", lambda _: nullcontext("nowhere"))
    monkeypatch.setattr(explaining, "Explainer", lambda *_: SimpleNamespace(by_index=lambda *_: found))
    asked = ["explain", "--partition", "0", "--index", "3", "--state-dir", str(tmp_path)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and max(map(len, done.stdout.splitlines())) < 160
    said, html = " ".join(done.stdout.split()), views.explanation(found)
    for of in ("user", "movie"):
        numbers = " ".join(f"{factor:+.3f}" for factor in found["factors"][of])
        assert len(numbers.split()) == 20 and f"{of} factors: {numbers}" in said
        assert numbers in html[html.index("<details>") :]


def test_windows_are_shown_with_verdicts() -> None:
    rows = [
        {**row, "verdict": "WRONG", "reason": "holds <3>", "difference": -2, "expected": {"count": 12}}
        for row in filled().history(TYPES[0], now_ms=NOW)
    ]
    html = views.windows(rows)
    assert "rp-wrong" in html and "holds &lt;3&gt;" in html and "<td>-2</td>" in html
    assert "no data yet" in views.windows([])


def test_what_comes_from_kafka_is_escaped() -> None:
    html = views.ratings_tail([(0, 7, b"<script>alert(1)</script>"), (1, 8, None)], {})
    assert "<script>" not in html and "&lt;script&gt;" in html and 'data-rp-place="0/7"' in html
    health = Health("degraded", ("<b>bad</b>",), NOW)
    html = views.header(health, True, iso_ms(NOW), "<i>run</i>")
    assert "<i>run" not in html and "<b>bad" not in html and "stale since" in html


def test_the_scoreboard_shows_each_model_beside_floor_and_baselines() -> None:
    html = views.scoreboard(scored().scores()["models"])
    assert html.index("better") < html.index("0.6000") < html.index("best possible") < html.index("worse")
    assert html.count("biases only") == 2 and "7 repeated" in html and "50.0 %" in html
    assert "<i>" not in views.scoreboard([score("<i>", 0.9)])
    assert "no predictions yet" in views.scoreboard([])


def test_the_plan_is_changed_over_http_and_a_malformed_one_is_refused_with_its_place() -> None:
    client, control = make()
    answer = client.post("/control/plan", json={"plan": " 500  for 1m then 3"})
    assert answer.json() == {"id": "id", "command": "plan", "applied": True, "plan": "500 for 1m then 3"}
    refused = client.post("/control/plan", json={"plan": "500 then 3"})
    assert refused.status_code == 422 and "character 5" in refused.json()["error"]
    assert control.sent == [("plan", " 500  for 1m then 3")]


def test_the_plan_ahead_is_shown_beside_what_was_delivered() -> None:
    store = MetricsStore(TYPES)
    zero_ms = NOW - 60_000
    text = "100 for 90s then 400"
    generator = {"state": "running", "plan": text, "clock_offset_ms": 0}
    store.progress("generator", {**generator, "epochs": [Epoch(zero_ms, 0.0, text, zero_ms).to_record()]}, NOW)
    for second in range(0, 40, 2):
        at_ms = NOW - 40_000 + second * 1000
        shard = ShardProgress("r", "c", 0, second * 90, at_ms, at_ms, (Epoch(zero_ms, 90.0),), 1.0, 0.5)
        store.progress("shard/0", json.loads(shard.to_json()), NOW)
    found = store.plan(NOW, "7")
    rates = {round((at_ms - NOW) / 1000): rate for at_ms, rate in found["planned"]}
    assert min(rates) >= -63 and max(rates) >= 590 and len(rates) < 300
    assert {rate for at, rate in rates.items() if -55 < at < 25} == {100.0} and rates[max(rates)] == 400.0
    assert [rate for _, rate in found["delivered"]] == [90.0] * 19
    assert {rate for _, rate in found["typed"]} == {7.0}
    chart = views.plan_curve(found, NOW)
    assert set(chart["rate"]) == {"plan", "delivered", "as typed"} and len(chart) < 600
    nothing = views.plan_curve(MetricsStore(TYPES).plan(NOW), NOW)  # the chart knows all its lines from the beginning
    assert set(nothing["rate"]) == {"plan", "delivered", "as typed"} and nothing["ratings a second"].isna().all()
    store.progress("generator", {**generator, "state": "backfilling", "epochs": []}, NOW)
    assert store.plan(NOW)["delivered"] == []  # another clock, while the past is made


def test_pieces_to_drag_are_well_formed_plans_when_they_are_let_go() -> None:
    found = re.findall(r'data-rp-piece="([^"]+)"', views.pieces())
    assert len(found) >= 3
    for piece in found:
        parse_plan("100" + piece)


def test_fragments_of_an_empty_store_say_no_data_yet() -> None:
    store = MetricsStore(TYPES)
    summary = store.summary(NOW)
    assert "no data yet" in views.movies(None, []) and "no data yet" in views.actors(summary["generator"], {})
    assert "no data yet" in views.tiles(summary, TYPES[0])
    assert len(views.histogram(None)) == 10


def test_tiles_and_charts_show_the_stores_numbers() -> None:
    store = filled()
    summary = store.summary(NOW)
    assert "3.500 ★" in views.tiles(summary, TYPES[0])
    count, mean = views.history(store.history(TYPES[0]))
    # the last window is still filling
    assert count["ratings"].tolist() == [10, 11] and mean["mean rating"].tolist() == [3.5] * 2
    top = store.topn(TYPES[0])
    html = views.movies(top, ["A & B"] * 20)
    assert "A &amp; B" in html and ">29<" in html


@pytest.mark.parametrize(
    ("host", "url", "everywhere"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000", False),
        ("localhost", "http://localhost:8000", False),
        ("::1", "http://[::1]:8000", False),
        ("10.0.0.7", "http://10.0.0.7:8000", False),
        ("0.0.0.0", "http://127.0.0.1:8000", True),
        ("::", "http://[::1]:8000", True),
    ],
)
def test_a_url_leads_to_the_server_whatever_it_listens_at(host: str, url: str, everywhere: bool) -> None:
    assert url_of(host, 8000) == url
    assert told(url, host) == (f"{url} (from elsewhere: http://{socket.gethostname()}:8000)" if everywhere else url)


def test_links_to_an_api_that_listens_everywhere_follow_the_page() -> None:
    fixed, following = (views.links("http://127.0.0.1:8000", everywhere) for everywhere in (False, True))
    assert fixed.count('<a href="http://127.0.0.1:8000/') == following.count('<a href="http://127.0.0.1:8000/') == 4
    assert (fixed.count(" data-rp-everywhere"), following.count(" data-rp-everywhere")) == (0, 4)
    assert "[data-rp-everywhere]" in Path(views.__file__).with_name("dashboard.js").read_text()


def test_serve_alone_says_the_token_that_others_must_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []

    class Stage:
        def __init__(self, settings: Settings, _bootstrap: str) -> None:
            tokens.append(settings.control_token)

        def start(self) -> None:
            """Nothing is bound."""

        def urls(self) -> dict[str, str]:
            return {"api": "http://127.0.0.1:8000", "ui": "http://127.0.0.1:8501"}

        def stop(self) -> None:
            """Nothing runs."""

    class Stop(commands.StopSignal):
        def install(self) -> None:
            self.event.set()

    monkeypatch.setattr(commands, "StopSignal", Stop)
    monkeypatch.setattr(commands, "check_broker", lambda _: None)
    monkeypatch.setattr(commands, "ensure_topics", lambda *_: None)
    monkeypatch.setattr(commands, "partitions_of", lambda *_: {})
    monkeypatch.setattr("ray_pipeline.doctor.require", lambda *_: None)
    monkeypatch.setattr("ray_pipeline.serving.server.ServingStage", Stage)
    for flags, token in (([], None), (["--control-token", "chosen-by-me"], "chosen-by-me")):
        done = CliRunner().invoke(app, ["serve", "--bootstrap-servers", "nowhere:1", "--api-host", "0.0.0.0", *flags])
        assert done.exit_code == 0, done.output
        # whoever is elsewhere cannot use the loopback's address, and only what listens everywhere is of use to him
        assert f"api: http://127.0.0.1:8000 (from elsewhere: http://{socket.gethostname()}:8000)\n" in done.output
        assert "ui: http://127.0.0.1:8501\n" in done.output
        assert f"control token: {tokens[-1]}" in done.output and len(tokens[-1] or "") >= 8
        assert token in (None, tokens[-1])
