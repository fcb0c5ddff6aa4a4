"""The part of the page where a stream is put together, in Gradio: one control for each setting, made from the settings model."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import gradio as gr

from ray_pipeline.clock import Clock
from ray_pipeline.config import EVENT_FIELDS, Settings
from ray_pipeline.errors import RayPipelineError
from ray_pipeline.knobs import Knob, knob_of
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.presets import preset_names, preset_purpose
from ray_pipeline.serving.workload import fragments
from ray_pipeline.serving.workload.composing import (
    SHOWN_FIELDS,
    Composed,
    compose,
    in_force,
    locked_fields,
    preset_values,
    shown_values,
)
from ray_pipeline.serving.workload.previews import Previews
from ray_pipeline.truth.replay import published_catalogue, published_settings

__all__ = ["Workload", "build_workload", "control_of"]

_SLIDER_MOST = 1_000
_EXACT_MOST = 2**53
_ABOUT = """<p class="rp-sub">Rate, plan and pause above act on the stream that runs. Each rating is a pure function of the settings
in <b>bold</b>, so with another value it is another stream: put it together here, see what it would be like, and start it beside
this one, with a state of its own. Nothing here touches the stream that runs.</p>"""
_WAIT = '<p class="rp-sub">The preview is made …</p>'


class Workload:
    """What the handlers of this part need.

    Args:
        settings: those of the page's process.
        store: has the records ``run`` and ``generator``.
        clock: tells the time.
    """

    def __init__(self, settings: Settings, store: MetricsStore, clock: Clock) -> None:
        self.settings = settings
        self._store = store
        self._clock = clock
        self._previews = Previews()
        self._published: tuple[Any, Settings] = (None, settings)

    def present(self) -> Settings:
        """The settings of the stream in force.

        Raises:
            StateMismatchError: the run is another world's: its catalogue or model file is not here.
        """
        run = self._store.run()
        if run and self._published[0] != (run["run"], run["config"]):
            found = published_settings(self.settings, run, published_catalogue(self.settings, run))
            self._published = ((run["run"], run["config"]), found)
        return in_force(self._published[1], self._store.generator(self._clock.now_ms()))

    def fill(self) -> list[Any]:
        """Preset (none) and the value of every control, as they are in force; what cannot be told stays as it is."""
        try:
            return ["", *shown_values(self.present()).values()]
        except RayPipelineError:  # said where the stream would be told
            return ["", *shown_values(self.settings).values()]

    def choose(self, preset: str | None) -> list[Any]:
        """The value of every control, by a preset; without one as they are in force."""
        if not preset:
            return self.fill()[1:]
        try:
            return list(preset_values(preset, self.present()).values())
        except RayPipelineError:
            return [gr.skip() for _ in SHOWN_FIELDS]

    def told(self, preset: str | None, *shown: Any) -> tuple[str, str]:
        """What differs from the stream in force, or what is wrong with the values; and what starts this one. As HTML."""
        try:
            composed = self._composed(preset, shown)[1]
        except RayPipelineError as error:
            return fragments.problem(str(error)), ""
        return fragments.difference(composed.changed), fragments.starts(composed)

    def preview(self, preset: str | None, *shown: Any) -> str:
        """What it would be like, beside the stream in force, as HTML; empty while the values are wrong, which :meth:`told` says."""
        try:
            present, composed = self._composed(preset, shown)
        except RayPipelineError:
            return ""
        try:
            return fragments.compared(*self._previews.both(present, composed.settings))
        except RayPipelineError as error:
            return fragments.problem(str(error))

    def _composed(self, preset: str | None, shown: tuple[Any, ...]) -> tuple[Settings, Composed]:
        present = self.present()
        return present, compose(present, dict(zip(SHOWN_FIELDS, shown, strict=True)), preset or None)


def control_of(knob: Knob, value: Any, reason: str = "") -> Any:
    """The control of a setting: what its kind and range ask for.

    Args:
        knob: the setting.
        value: what it shows first.
        reason: why it cannot be changed; empty when it can.
    """
    about: dict[str, Any] = {
        "value": value,
        "label": fragments.label(knob),
        "info": fragments.help_text(knob, reason),
        "interactive": not reason,
        "elem_id": f"rp-set-{knob.name}",
        "elem_classes": ["rp-knob", *(["rp-new-stream"] if knob.name in EVENT_FIELDS else [])],
        "min_width": 200,
    }
    if knob.kind == "choice":
        return gr.Dropdown([(str(choice), choice) for choice in knob.choices], **about)
    if knob.kind == "flag":
        return gr.Checkbox(**about)
    if knob.kind not in ("whole", "number") or (knob.high or 0) > _EXACT_MOST:
        # the browser's numbers cannot hold every seed
        several: dict[str, Any] = (
            {"lines": 2, "max_lines": 6} if knob.kind == "texts" or knob.name == "plan" else {"max_lines": 1}
        )
        return gr.Textbox(**about | {"value": str(value)}, **several)
    if knob.low is not None and knob.high is not None and knob.high - knob.low <= _SLIDER_MOST and not knob.open_low:
        step = 1 if knob.kind == "whole" else 0.001 if knob.high - knob.low <= 1 else 0.01
        slider = gr.Slider(knob.low, knob.high, step=step, **about)
        # not Gradio, the settings model says what is wrong with a number; a gr.Number has no bounds for the same reason
        slider.preprocess = lambda payload: payload  # type: ignore[method-assign]
        return slider
    return gr.Number(**about)


def build_workload(workload: Workload) -> None:
    """The part, closed; nothing is worked out before somebody opens it."""
    values, locked = shown_values(workload.settings), locked_fields(workload.settings)
    with gr.Accordion("Workload: put another stream together", open=False, elem_id="rp-workload") as part:
        gr.HTML(_ABOUT)
        with gr.Row(elem_classes="rp-controls"):
            preset = gr.Dropdown(
                [("none", ""), *((f"{name}: {preset_purpose(name)}", name) for name in preset_names())],
                value="",
                label="Preset",
                info="fills the controls; change them further as you like",
                elem_id="rp-preset",
                min_width=320,
                scale=4,
            )
            again = gr.Button("As in force", elem_id="rp-as-in-force", min_width=140, scale=0)
        with gr.Row(elem_classes="rp-beside-each-other"):
            with gr.Column(min_width=340, scale=3), gr.Tabs(elem_id="rp-groups", overflow_behavior="wrap"):
                controls = _controls(values, locked)
            with gr.Column(min_width=340, scale=2):
                told = gr.HTML("", elem_id="rp-told")
                compared = gr.HTML(_WAIT, elem_id="rp-preview")
                starts = gr.HTML("", elem_id="rp-starts")
    filled = gr.State(False)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    shown = [preset, *controls]

    def open_first(before: bool) -> list[Any]:
        return [True, *([gr.skip()] * len(shown) if before else workload.fill())]

    def tell(after: Any) -> None:
        after.then(workload.told, shown, [told, starts], **quiet).then(workload.preview, shown, [compared], **quiet)

    tell(part.expand(open_first, [filled], [filled, *shown], **quiet))
    tell(again.click(workload.fill, None, shown, **quiet))
    tell(preset.input(workload.choose, [preset], controls, **quiet))
    triggers = [control.change for control in controls]
    gr.on(triggers, workload.told, shown, [told, starts], trigger_mode="always_last", **quiet)
    gr.on(triggers, workload.preview, shown, [compared], trigger_mode="always_last", **quiet)


def _controls(values: dict[str, Any], locked: dict[str, str]) -> list[Any]:
    """A tab for each group of the model."""
    found = []
    for group, knobs in groupby(map(knob_of, SHOWN_FIELDS), lambda knob: knob.group):
        with gr.Tab(group), gr.Row(elem_classes="rp-knobs"):
            found += [control_of(knob, values[knob.name], locked.get(knob.name, "")) for knob in knobs]
    return found
