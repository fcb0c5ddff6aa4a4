"""What the page says in each state of the pipeline, and its rate, without a server."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from ray_pipeline.clock import FakeClock
from ray_pipeline.config import load_settings
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.serving import views
from ray_pipeline.serving.dashboard import Page
from ray_pipeline.serving.gate import ControlGate
from ray_pipeline.windows.spec import iso_ms

NOW = 1_700_000_040_000
WINDOW = "tumbling_10s"
CATALOGUE = load_catalogue(load_settings(movies=50))


class Control:
    """Obeys, or refuses."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, float | None]] = []
        self.refusal: ConfigurationError | None = None
        self.applied = True

    def send(self, command: str, rate: float | None = None, plan: str | None = None) -> tuple[str, bool]:
        if self.refusal is not None:
            raise self.refusal
        self.sent.append((command, rate))
        return "id", self.applied


class Pipeline:
    """A store that stages report to, and the page above it."""

    def __init__(self) -> None:
        self.store = MetricsStore((WINDOW,))
        self.store.kafka_connected = True
        self.clock = FakeClock(NOW)
        self.control = Control()
        feed: Any = SimpleNamespace(tail=lambda count: [])
        control: Any = self.control
        self.page = Page(self.store, CATALOGUE, feed, control, ControlGate("t", (8501,)), None, self.clock)  # type: ignore[arg-type]

    def generator(self, **changes: Any) -> None:
        said = {"run": "r1", "state": "running", "target_rate": 200.0, "plan_rate": 200.0, "behind_s": 0.0}
        self.store.progress("generator", {**said, "updated_ms": self.clock.now_ms(), **changes}, self.clock.now_ms())

    def job(self, **changes: Any) -> None:
        said = {"state": "running", "batch": 500, "partitions": {}, "watermark_ms": NOW, "updated_ms": NOW}
        self.store.job({**said, **changes}, self.clock.now_ms())

    def oracle(self, **changes: Any) -> None:
        self.store.expected(
            "oracle", {"state": "running", "batch": 500, "updated_ms": NOW, **changes}, self.clock.now_ms()
        )

    def header(self) -> str:
        return self._text(self.page.refresh(WINDOW, "", "")[0])

    def tile(self, label: str) -> str:
        """A tile's value and note."""
        tiles = re.findall(r'class="rp-tile">(.*?)</div>', self.page.refresh(WINDOW, "", "")[1])
        found: str = next(self._text(tile) for tile in tiles if f"<span>{label}</span>" in tile)
        return found.removeprefix(label).strip()

    @staticmethod
    def _text(html: str) -> str:
        return " ".join(re.sub("<[^>]*>", " ", html).split())


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


def test_before_anything_has_arrived(pipeline: Pipeline) -> None:
    assert (
        pipeline.header() == "ray-pipeline run – · not started · Kafka connected · no window yet starting no data yet"
    )
    assert pipeline.tile("Target") == "– no data yet" and pipeline.tile("Batch") == "– none yet"
    pipeline.generator(state="starting")
    pipeline.job(batch=-1)
    assert "run r1 · starting · Kafka connected" in pipeline.header() and "no data yet" in pipeline.header()
    assert pipeline.tile("Target") == "200/s starting" and pipeline.tile("Batch") == "– none yet"


def test_paused_is_said_at_the_top_and_beside_the_target(pipeline: Pipeline) -> None:
    pipeline.generator(state="paused", plan_rate=0.0)
    pipeline.job()
    pipeline.oracle()
    assert "run r1 · paused · Kafka connected" in pipeline.header()
    assert pipeline.tile("Target") == "0/s paused"


def test_without_kafka_the_page_says_since_when_it_is_stale(pipeline: Pipeline) -> None:
    pipeline.generator()
    pipeline.job()
    pipeline.store.kafka_connected = False
    assert "Kafka away" in pipeline.header() and "no Kafka broker answers" in pipeline.header()
    pipeline.clock.advance(24 * 3600)
    assert f"stale since {iso_ms(NOW)[:19].replace('T', ' ')} UTC" in pipeline.header()


def test_an_oracle_that_is_behind_is_said_with_how_far(pipeline: Pipeline) -> None:
    pipeline.generator()
    pipeline.job()
    pipeline.oracle(batch=350)
    assert "degraded the oracle is 150 micro-batches behind" in pipeline.header()


def test_the_first_wrong_window_is_named_at_the_top_and_on_its_tile(pipeline: Pipeline) -> None:
    pipeline.generator()
    pipeline.job()
    pipeline.oracle()
    window = {"window_type": WINDOW, "window_start": iso_ms(NOW - 20_000), "window_end": iso_ms(NOW - 10_000)}
    said = {**window, "avg_rating": 3.0, "p50": 3.0, "p95": 3.0, "histogram": [0] * 10, "batch": 499}
    parts = {"movies": [], "genres": [], "late": 0, "unread": 0, "partitions": {}}
    pipeline.store.expected("w", {**said, **parts, "count": 5, "final": True, "final_ms": NOW, "updated_ms": NOW}, NOW)
    pipeline.store.window({**said, "kind": "total", "count": 4, "updated_ms": NOW})
    pipeline.store.window({**said, "kind": "topn", "count": 4, "movies": [], "updated_ms": NOW})
    pipeline.store.window({**said, "kind": "genres", "count": 4, "genres": [], "updated_ms": NOW})
    pipeline.clock.advance(8)
    assert f"unhealthy window {WINDOW} from {iso_ms(NOW - 20_000)}" in pipeline.header()
    assert pipeline.tile("Windows wrong") == f"1 first: {iso_ms(NOW - 20_000)[11:19]} {WINDOW}"


def request() -> gr.Request:
    asked: Any = SimpleNamespace(client=SimpleNamespace(host="127.0.0.1"), headers={"host": "127.0.0.1:8501"})
    return asked  # type: ignore[no-any-return]


@pytest.mark.parametrize("rate", [0.2, 1.0, 12_345.0, 2.5e6])
def test_any_rate_is_sent_and_the_field_is_left_as_it_was_typed(pipeline: Pipeline, rate: float) -> None:
    pipeline.generator()
    said, shown = pipeline.page.set_rate(request(), "", rate)
    assert "done" in said and pipeline.control.sent == [("rate", rate)] and shown == gr.skip()


def test_a_rate_that_is_not_in_force_does_not_stay_in_the_field(pipeline: Pipeline) -> None:
    pipeline.generator()
    assert pipeline.page.set_rate(request(), "", None)[1] == 200.0 and pipeline.control.sent == []
    pipeline.control.applied = False
    said, shown = pipeline.page.set_rate(request(), "", 300.0)
    assert "has not answered yet" in said and shown == 200.0
    pipeline.control.refusal = ConfigurationError(problem="rate -1.0 is not a number above 0")
    said, shown = pipeline.page.set_rate(request(), "", -1.0)
    assert "not a number above 0" in said and shown == 200.0


def test_the_rate_shown_is_the_one_in_force_whoever_set_it(pipeline: Pipeline) -> None:
    assert pipeline.page.rate() == gr.skip()
    pipeline.generator(target_rate=0.2)
    assert pipeline.page.refresh(WINDOW, "", "")[-1] == 0.2
    pipeline.generator(target_rate=1_234_567.0)
    assert pipeline.page.plan_text() == "1234567"  # to be sent again as it stands
    pipeline.generator(target_rate=347.29384, plan="ramp(0..500, 10m)")
    assert pipeline.page.rate() == 347.0


def test_charts_say_utc_wherever_the_browser_is(pipeline: Pipeline) -> None:
    window = {"window_type": WINDOW, "window_start": iso_ms(NOW), "window_end": iso_ms(NOW + 10_000), "count": 4}
    pipeline.store.window({**window, "kind": "total", "avg_rating": 3.0, "histogram": [0] * 10, "updated_ms": NOW})
    in_berlin = -60  # a browser there adds an hour to what it is given
    for chart, time in ((2, "window"), (11, "time")):
        here, there = (pipeline.page.refresh(WINDOW, "", "", behind)[chart][time][0] for behind in (0, in_berlin))
        assert (there - here).total_seconds() == -3600


# -- records of somebody else, and what cannot be shown

FAR = ("0001-01-01T00:00:00.000Z", "1677-09-21T00:00:00.000Z", "2262-04-11T23:47:00.000Z", "9999-12-31T23:59:00.000Z")


@pytest.mark.parametrize("start", FAR)
def test_a_window_of_another_age_is_not_drawn_and_the_others_are(start: str) -> None:
    far = {"window_start": start, "count": 7, "avg_rating": 1.0, "final": False}
    near = [{"window_start": iso_ms(NOW + n * 10_000), "count": n, "avg_rating": 3.0, "final": n < 2} for n in range(3)]
    for found in (views.history([far, *near]), views.history([*near, far])):
        for chart, expected in zip(found, views.history(near), strict=True):
            assert chart.equals(expected) and len(chart) == 2, "without the one that is still filling"
    assert [len(chart) for chart in views.history([far])] == [0, 0]


def test_movies_that_nobody_has_rated_are_shown_as_such() -> None:
    movie = {"movieId": 5, "count": 0, "avg_rating": 0.0}
    assert "width:0%" in views.movies({"movies": [movie]}, [None])


def test_foreign_records_do_not_freeze_the_page(pipeline: Pipeline) -> None:
    pipeline.generator()
    for start in (iso_ms(NOW), FAR[-1]):
        said = {"window_type": WINDOW, "window_start": start, "window_end": start, "count": 0, "updated_ms": NOW}
        movie = {"movieId": 5, "count": 0, "avg_rating": 0.0}
        pipeline.store.window({**said, "kind": "total", "avg_rating": 3.0, "histogram": [0] * 10})
        pipeline.store.window({**said, "kind": "topn", "avg_rating": 3.0, "movies": [movie]})
    shown = pipeline.page.refresh(WINDOW, "", "")
    assert "run r1 · running" in pipeline._text(shown[0])
    assert len(shown[2]) == len(shown[3]) == 1 and "width:0%" in shown[6]


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("somebody else's record")


@pytest.mark.parametrize(
    ("method", "missing"),
    [("topn", {6}), ("genres", {5}), ("scores", {10}), ("summary", {1, 4, 7}), ("history", {2, 3, 9}), ("plan", {11})],
)
def test_what_cannot_be_shown_is_left_as_it_was_logged_once_and_hides_nothing_else(
    pipeline: Pipeline,
    method: str,
    missing: set[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline.generator()
    monkeypatch.setattr(pipeline.store, method, broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            shown = pipeline.page.refresh(WINDOW, "", "")
    assert "run r1 · running" in pipeline._text(shown[0])
    assert {at for at, value in enumerate(shown) if isinstance(value, dict)} == missing
    assert len([line for line in caplog.messages if "cannot be shown" in line]) == len(missing)
    monkeypatch.undo()
    assert not any(isinstance(value, dict) for value in pipeline.page.refresh(WINDOW, "", ""))


def test_health_that_cannot_be_told_is_not_left_as_it_was(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.store, "health", broken)
    shown = pipeline.page.refresh(WINDOW, "", "")
    assert "health cannot be told" in shown[0] and "rp-tiles" in shown[1]


def test_what_cannot_be_shown_when_the_page_is_made_is_empty(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.generator()
    monkeypatch.setattr(pipeline.store, "topn", broken)
    first = pipeline.page.at_first(WINDOW)
    assert [at for at, value in enumerate(first) if value is None] == [6] and first[12:14] == ("200", "200")
