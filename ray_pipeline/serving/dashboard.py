"""The dashboard: one timer, one handler, native plots whose data alone change."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from fastapi import FastAPI

from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.errors import PlanError, RayPipelineError
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.rates.language import parse_plan, tidy
from ray_pipeline.serving import views
from ray_pipeline.serving.control import Control
from ray_pipeline.serving.explanations import Explanations
from ray_pipeline.serving.feed import Feed
from ray_pipeline.serving.gate import ControlGate, Refused, is_loopback
from ray_pipeline.serving.reach import is_everywhere
from ray_pipeline.serving.workload.panel import Workload, build_workload

__all__ = ["Page", "make_dashboard"]

_log = logging.getLogger(__name__)

_HEALTH = "health"
_CSS = Path(__file__).with_name("dashboard.css")
_SCRIPT = Path(__file__).with_name("dashboard.js")
_WINDOWS_SHOWN = 120
_MOVIES_SHOWN = 10
_RATINGS_SHOWN = 8
_VERDICTS_SHOWN = 8
_MODELS_SHOWN = 10
_REFRESH_CHOICES_S = (1.0, 2.0, 5.0)
_CURVE_COLOURS = {"plan": "#64748b", "delivered": "#14b8a6", "as typed": "#d97706"}
_RATE_STEPS = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 2.8, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)
_SLIDER_RATES = (*(float(f"{digits}e{power}") for power in range(-1, 6) for digits in _RATE_STEPS), 1e6)
_FROM_ZERO: list[float | None] = [0, None]
# with room at both ends: labels that would touch each other are left out
_UTC: dict[str, Any] = {"x_title": "UTC", "x_axis_format": "\u2003%H:%M:%S\u2003"}
_PLOT: dict[str, Any] = {"height": 260, "min_width": 340}


class Page:
    """What the handlers of the page do, without the page; arguments as of :func:`make_dashboard`."""

    def __init__(
        self,
        store: MetricsStore,
        catalogue: Catalogue,
        feed: Feed,
        control: Control,
        gate: ControlGate,
        explanations: Explanations,
        clock: Clock,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._feed = feed
        self._control = control
        self._gate = gate
        self._explanations = explanations
        self._clock = clock
        self._titles = dict(zip(catalogue.movie_ids.tolist(), catalogue.titles, strict=True))
        self._failed: set[tuple[str, type[Exception]]] = set()

    def refresh(self, window_type: str, draft: str, shown: str, behind_utc_min: float = 0) -> tuple[Any, ...]:
        """Everything that changes, in the order of the page's outputs. One that cannot be made keeps no other from being shown.

        Args:
            window_type: of which windows.
            draft: a plan that somebody is writing; empty when nobody is.
            shown: the plan in force when the page last looked.
            behind_utc_min: how far the browser's time is behind UTC, minutes.
        """
        now_ms, store = self._clock.now_ms(), self._store
        summary = functools.cache(functools.partial(store.summary, now_ms))
        plan = functools.cache(self.plan_text)

        @functools.cache
        def charts() -> tuple[pd.DataFrame, pd.DataFrame]:
            return views.history(store.history(window_type, limit=_WINDOWS_SHOWN))

        outputs: dict[str, Callable[[], Any]] = {
            _HEALTH: lambda: self._header(now_ms),
            "the numbers": lambda: views.tiles(summary(), window_type),
            "ratings by window": lambda: _in_utc(charts()[0], behind_utc_min),
            "the mean by window": lambda: _in_utc(charts()[1], behind_utc_min),
            "ratings by stars": lambda: views.histogram(summary()["windows"].get(window_type)),
            "ratings by genre": lambda: views.genres(store.genres(window_type), self._catalogue.genre_names),
            "the top movies": lambda: self._movies(window_type),
            "the actors": lambda: views.actors(summary()["generator"], summary()["job"]),
            "the newest ratings": self._tail,
            "the verdicts": lambda: views.windows(store.history(window_type, limit=_VERDICTS_SHOWN, now_ms=now_ms)),
            "the scoreboard": self._scoreboard,
            "the curve": lambda: self.curve(draft, behind_utc_min),
            "the plan's text": lambda: gr.skip() if draft or plan() == shown else plan(),
            "the plan": plan,
            "the rate": self.rate,
        }
        return tuple(self._shown(name, make) for name, make in outputs.items())

    def at_first(self, window_type: str) -> tuple[Any, ...]:
        """What the page's outputs begin with; None where one cannot be made yet."""
        return tuple(None if isinstance(shown, dict) else shown for shown in self.refresh(window_type, "", ""))

    def _shown(self, name: str, make: Callable[[], Any]) -> Any:
        """An output; as it was where it cannot be made, which is logged once. But health that is old would be a lie."""
        try:
            return make()
        except Exception as error:  # noqa: BLE001 - whatever it is: the rest of the page goes on without it
            failure = name, type(error)
            if failure not in self._failed:
                self._failed.add(failure)
                _log.warning("%s cannot be shown: %r", name, error, exc_info=True)
            return _note("health cannot be told: the log says why", bad=True) if name == _HEALTH else gr.skip()

    def _header(self, now_ms: int) -> str:
        store, generator = self._store, self._store.generator(now_ms)
        health, updated = store.health(now_ms), store.last_update()
        return views.header(health, store.kafka_connected, updated, generator.get("run"), generator.get("state"))

    def _movies(self, window_type: str) -> str:
        top = self._store.topn(window_type)
        if top is not None:
            top = {**top, "movies": top["movies"][:_MOVIES_SHOWN]}
        titles = [self._titles.get(movie["movieId"]) for movie in top["movies"]] if top else []
        return views.movies(top, titles)

    def _tail(self) -> str:
        newest = [(record.partition, record.offset, record.value) for record in self._feed.tail(_RATINGS_SHOWN)]
        return views.ratings_tail(newest, self._titles)

    def _scoreboard(self) -> str:
        scores = self._store.scores()
        return views.scoreboard(
            scores["models"][:_MODELS_SHOWN], scores["reason"] if scores["state"] == "failed" else ""
        )

    def curve(self, typed: str, behind_utc_min: float = 0) -> pd.DataFrame:
        """The plan ahead, the delivered rate, and how the plan would be that somebody has typed."""
        now_ms = self._clock.now_ms()
        changed = bool(typed.strip()) and tidy(typed) != self.plan_text()
        try:
            curve = views.plan_curve(self._store.plan(now_ms, tidy(typed) if changed else None), now_ms)
        except PlanError:  # said beside the field while it is typed
            curve = views.plan_curve(self._store.plan(now_ms), now_ms)
        return _in_utc(curve, behind_utc_min)

    def check_plan(self, typed: str, behind_utc_min: float = 0) -> tuple[str, pd.DataFrame, str]:
        """What is wrong with a plan, as a line of HTML, how it would look, and the plan again while it is not the one in force."""
        said = ""
        try:
            if typed.strip():
                parse_plan(typed)
        except PlanError as error:
            said = _note(str(error), bad=True)
        return said, self.curve(typed, behind_utc_min), "" if typed.strip() == self.plan_text() else typed

    def plan_text(self) -> str:
        """The plan in force; a constant rate as its number."""
        generator = self._store.generator(self._clock.now_ms())
        return generator.get("plan") or f"{generator.get('target_rate', 0.0):.15g}"

    def explain(self, place: str) -> str:
        """Where the record at ``partition/offset`` comes from, as HTML."""
        partition, _, offset = place.partition("/")
        if not (partition.isdigit() and offset.isdigit()):
            return ""
        try:
            return views.explanation(self._explanations.by_offset(int(partition), int(offset)))
        except RayPipelineError as error:
            return _note(str(error), bad=True)

    def rate(self) -> Any:
        """The rate in force, ratings a second, whoever set it; a plan's in three digits, for it changes all the time."""
        generator = self._store.generator(self._clock.now_ms())
        rate = generator.get("target_rate")
        if rate is None:
            return gr.skip()
        return float(f"{rate:.3g}") if generator.get("plan") else rate

    def set_rate(self, request: gr.Request, token: str, rate: float | None) -> tuple[str, Any]:
        """Send a rate; what became of it, as a line of HTML, and what the field is to show: the rate in force unless it is this one."""
        if rate is None:
            return _note("no rate: give ratings a second, such as 250 or 0.2", bad=True), self.rate()
        said = self.command(request, token, "rate", rate)
        return said, self.rate() if "rp-note-bad" in said else gr.skip()

    def command(
        self, request: gr.Request, token: str, command: str, rate: float | None = None, plan: str | None = None
    ) -> str:
        """Send a command; what became of it, as a line of HTML."""
        try:
            client = request.client.host if request.client else None
            headers = request.headers
            self._gate.check(client, headers.get("host"), headers.get("origin"), token or None)
            if plan is not None:
                parse_plan(plan)
            _, applied = self._control.send(command, rate, plan=plan)
        except Refused as error:
            return _note(f"refused: {error.reason}", bad=True)
        except RayPipelineError as error:
            return _note(str(error), bad=True)
        what = f"rate {rate:,.15g}/s" if rate is not None else command
        return _note(
            f"{what}: done" if applied else f"{what}: sent, the generator has not answered yet", bad=not applied
        )


def _in_utc(chart: pd.DataFrame, behind_utc_min: float) -> pd.DataFrame:
    """A chart's data, moved so that a browser, which writes times as those of its place, writes UTC as the tables do."""
    times = chart.columns[0]
    return chart.assign(**{times: chart[times] + pd.Timedelta(minutes=behind_utc_min)})


def _note(text: str, bad: bool = False) -> str:
    from html import escape

    return f'<p class="rp-note{" rp-note-bad" if bad else ""}" role="status">{escape(text)}</p>'


def make_dashboard(
    store: MetricsStore,
    catalogue: Catalogue,
    feed: Feed,
    control: Control,
    gate: ControlGate,
    explanations: Explanations,
    settings: Settings,
    api_url: str,
    clock: Clock,
) -> FastAPI:
    """The page as an application of its own.

    Args:
        store: what is shown.
        catalogue: titles of movies.
        feed: the live tail.
        control: sends commands.
        gate: decides who may.
        explanations: tell where a rating comes from.
        settings: refresh interval, first rate, address.
        api_url: is linked to.
        clock: tells the time.
    """
    page = Page(store, catalogue, feed, control, gate, explanations, clock)
    with gr.Blocks(title="ray-pipeline", analytics_enabled=False, fill_width=True) as blocks:
        _build(page, Workload(settings, store, clock), store, settings, api_url, blocks)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=settings.ui_host,
        server_port=settings.ui_port,
        theme=theme,
        css=_CSS.read_text(),
        head=f"<script>const rpRates = {json.dumps(_SLIDER_RATES)};\n{_SCRIPT.read_text()}</script>",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        show_error=True,
    )
    return mounted


def _position(rate: float) -> int:
    """The slider's position that is nearest to a rate, as the page's script has it."""
    return min(range(len(_SLIDER_RATES)), key=lambda at: abs(math.log(_SLIDER_RATES[at] / max(rate, _SLIDER_RATES[0]))))


def _build(
    page: Page, workload: Workload, store: MetricsStore, settings: Settings, api_url: str, blocks: gr.Blocks
) -> None:
    first = page.at_first(store.window_types[0])
    head = gr.HTML(first[0])
    numbers = gr.HTML(first[1])
    with gr.Row(elem_classes="rp-controls"):
        rate = gr.Number(
            settings.rate, label="Target rate, ratings a second", elem_id="rp-rate", min_width=210, scale=1
        )
        # its positions are rates of which each is somewhat more than the one before; the field holds any rate, exactly
        slider = gr.Slider(
            0,
            len(_SLIDER_RATES) - 1,
            _position(settings.rate),
            step=1,
            label="Target rate",
            show_label=False,
            buttons=[],
            interactive=True,
            elem_id="rp-slider",
            min_width=240,
            scale=3,
        )
        running = gr.Number(settings.rate, visible="hidden")
        set_rate = gr.Button("Set the rate", elem_id="rp-set-rate", elem_classes="rp-unseen")
        pause = gr.Button("Pause", elem_id="rp-pause", min_width=90, scale=0)
        resume = gr.Button("Resume", elem_id="rp-resume", min_width=90, scale=0)
        token = gr.Textbox(
            label="Control token",
            type="password",
            visible=not is_loopback(settings.ui_host),
            elem_id="rp-token",
            min_width=160,
        )
    with gr.Row(elem_classes="rp-controls"):
        plan = gr.Textbox(first[12], label="Rate plan", lines=2, elem_id="rp-plan", min_width=320, scale=4)
        follow = gr.Button("Follow this plan", elem_id="rp-follow", min_width=196, scale=0)
    with gr.Row(elem_classes="rp-controls"):
        gr.HTML(views.pieces(), min_width=340)
        with gr.Column(min_width=340):
            said = gr.HTML("", elem_id="rp-said")
            wrong = gr.HTML("", elem_id="rp-plan-said")
    draft, shown = gr.State(""), gr.State(first[13])
    curve = gr.LinePlot(
        first[11],
        x="time",
        y="ratings a second",
        color="rate",
        color_map=_CURVE_COLOURS,
        title="Planned and delivered rate",
        **_UTC,
        y_lim=_FROM_ZERO,
        elem_id="rp-curve",
        **_PLOT,
    )
    with gr.Row(elem_classes="rp-controls"):
        window_type = gr.Radio(
            list(store.window_types), value=store.window_types[0], label="Window", elem_id="rp-window", min_width=350
        )
        choices = sorted({*_REFRESH_CHOICES_S, settings.refresh_s})
        every = gr.Radio(
            [(f"{s:g} s", s) for s in choices],
            value=settings.refresh_s,
            label="Refresh",
            elem_id="rp-every",
            min_width=200,
        )
    with gr.Row():
        count = gr.LinePlot(
            first[2],
            x="window",
            y="ratings",
            title="Ratings by window",
            **_UTC,
            y_lim=_FROM_ZERO,
            elem_id="rp-count",
            **_PLOT,
        )
        mean = gr.LinePlot(
            first[3],
            x="window",
            y="mean rating",
            title="Mean rating by window",
            **_UTC,
            y_lim=[0.5, 5.0],
            **_PLOT,
        )
    with gr.Row():
        stars = gr.BarPlot(
            first[4], x="stars", y="ratings", title="Ratings by stars", x_title=" ", y_lim=_FROM_ZERO, **_PLOT
        )
        genres = gr.BarPlot(
            first[5],
            x="genre",
            y="ratings",
            title="Ratings by genre",
            x_title=" ",
            x_label_angle=-45,
            y_lim=_FROM_ZERO,
            **_PLOT,
        )
    with gr.Row():
        with gr.Column(min_width=360):
            movies = gr.HTML(first[6], elem_id="rp-movies")
            explained = gr.HTML(views.explanation(None), elem_id="rp-explained")
            place, explain = (
                gr.Textbox(visible=False),
                gr.Button("Explain", elem_id="rp-explain", elem_classes="rp-unseen"),
            )
        with gr.Column(min_width=360):
            checked = gr.HTML(first[9], elem_id="rp-windows")
            tail = gr.HTML(first[8], elem_id="rp-tail")
            actors = gr.HTML(first[7], elem_id="rp-actors")
    scores = gr.HTML(first[10], elem_id="rp-scores")
    build_workload(workload)
    gr.HTML(views.links(api_url, is_everywhere(settings.api_host)))
    outputs = [
        head,
        numbers,
        count,
        mean,
        stars,
        genres,
        movies,
        actors,
        tail,
        checked,
        scores,
        curve,
        plan,
        shown,
        running,
    ]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    timer = gr.Timer(settings.refresh_s)
    behind_utc = gr.Number(0, visible="hidden")
    blocks.load(None, None, [behind_utc], js="() => [new Date().getTimezoneOffset()]", **quiet)
    timer.tick(page.refresh, [window_type, draft, shown, behind_utc], outputs, trigger_mode="once", **quiet)
    window_type.change(page.refresh, [window_type, draft, shown, behind_utc], outputs, **quiet)
    # not only what is typed: a piece that was clicked is written by the page itself
    plan.change(page.check_plan, [plan, behind_utc], [wrong, curve, draft], trigger_mode="always_last", **quiet)
    every.change(lambda seconds: gr.Timer(seconds), [every], [timer], **quiet)

    def change_rate(value: float | None, given: str, request: gr.Request) -> tuple[str, Any]:
        return page.set_rate(request, given, value)

    def follow_plan(text: str, given: str, request: gr.Request) -> tuple[str, str]:
        said = page.command(request, given, "plan", plan=text)
        return said, text if "rp-note-bad" in said else ""

    def do_pause(given: str, request: gr.Request) -> str:
        return page.command(request, given, "pause")

    def do_resume(given: str, request: gr.Request) -> str:
        return page.command(request, given, "resume")

    explain.click(page.explain, [place], [explained], js="() => [window.rpPlace]", **quiet)
    # the script of the page writes into the field what the slider says, and presses the button when either has changed
    set_rate.click(change_rate, [rate, token], [said, rate], trigger_mode="always_last", **quiet)
    running.change(None, [running, rate], [rate], js="(running, shown) => [rpFollowed(running, shown)]", **quiet)
    rate.blur(None, [running, rate], [rate], js="(running, shown) => [rpLeft(running, shown)]", **quiet)
    rate.change(None, [rate], [slider], js="(rate) => [rpPosition(rate)]", **quiet)
    blocks.load(None, [rate], [slider], js="(rate) => [rpPosition(rate)]", **quiet)
    blocks.load(page.rate, None, [running], **quiet)
    follow.click(follow_plan, [plan, token], [said, draft], **quiet)
    pause.click(do_pause, [token], [said], **quiet)
    resume.click(do_resume, [token], [said], **quiet)
