"""Another stream put together on the page: controls from the settings model, a preview, and what starts it. Without a server."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import typer.main

from ray_pipeline.__main__ import app
from ray_pipeline.clock import FakeClock
from ray_pipeline.config import EVENT_FIELDS, GROUPS, Settings, load_settings, settings_of
from ray_pipeline.conformance.preview import preview, span_of
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.fitted import REPLACED_FIELDS, write_fitted
from ray_pipeline.knobs import knob_of
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.presets import preset_names
from ray_pipeline.serving.workload import fragments
from ray_pipeline.serving.workload.composing import SHOWN_FIELDS, compose, preset_values, shown_values
from ray_pipeline.serving.workload.panel import Workload, build_workload
from tests.unit.test_conformance import small_model, with_turned

NOW = 1_767_225_600_000
OWN = settings_of({"state_dir": "here", "users": 500, "movies": 100})


def workload(settings: Settings = OWN, store: MetricsStore | None = None) -> Workload:
    return Workload(settings, store or MetricsStore(("tumbling_1min",)), FakeClock(NOW))


def controls(settings: Settings = OWN) -> dict[str, Any]:
    async def built() -> gr.Blocks:
        with gr.Blocks() as page:
            build_workload(workload(settings))
        return page

    # Gradio asks for an event loop
    found = {str(block.elem_id): block for block in asyncio.run(built()).blocks.values()}
    return {name: found[f"rp-set-{name}"] for name in SHOWN_FIELDS}


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, Any]]:
    yield controls()


def test_whatever_an_event_is_a_function_of_has_a_control_by_itself() -> None:
    assert set(SHOWN_FIELDS) == {"rate", "plan", *EVENT_FIELDS}
    assert {knob_of(name).group for name in Settings.model_fields} == set(GROUPS.values())


@pytest.mark.parametrize("name", SHOWN_FIELDS)
def test_a_control_says_what_the_settings_model_says(name: str, made: dict[str, Any]) -> None:
    control, field, knob = made[name], Settings.model_fields[name], knob_of(name)
    assert field.description and control.info.startswith(field.description)
    assert ("rp-new-stream" in control.elem_classes) == (name in EVENT_FIELDS)
    assert control.interactive and control.label.replace(" ", "_").startswith(name.removesuffix("_s"))
    if knob.kind == "choice":
        assert [value for _, value in control.choices] == list(knob.choices) and len(knob.choices) > 1
    if isinstance(control, gr.Slider):
        assert (control.minimum, control.maximum) == (knob.low, knob.high)
        assert control.preprocess(knob.high + 1) == knob.high + 1  # for the settings model to refuse
    if isinstance(control, gr.Number):
        assert knob.range and knob.range in control.info


def test_a_control_is_what_the_kind_of_its_setting_asks_for(made: dict[str, Any]) -> None:
    kinds = {
        "late_share": gr.Slider,
        "rank": gr.Slider,
        "users": gr.Number,
        "rate": gr.Number,
        "late_law": gr.Dropdown,
        "seed": gr.Textbox,
        "drift": gr.Textbox,
    }
    assert {name: type(made[name]) for name in kinds} == kinds


def given_to_run(command: str) -> dict[str, Any]:
    """What the command line makes of a command that the page shows."""
    words = shlex.split(command)
    assert words[:2] == ["ray-pipeline", "run"]
    options = typer.main.get_command(app).commands["run"].make_context("run", words[2:]).params  # type: ignore[attr-defined]
    return {
        name: value for name, value in options.items() if name in Settings.model_fields and value not in (None, [], ())
    }


CHANGES: list[dict[str, Any]] = [
    {},
    {"plan": "", "rate": 0.25, "seed": str(2**63 - 1)},
    {"plan": "ramp(0..500, 10m) then 500"},
    {"users": 1_000, "late_share": 0.05, "clock_skew": "0:-30s", "late_law": "uniform"},
    {
        "drift": "abrupt at=100 genre=Horror size=-1\nabrupt at=900 size=0.5; gradual from=1 to=9 size=1",
        "whole_star_share": 1,
    },
    {"partitions": 1},
]


@pytest.mark.parametrize("preset", [None, *preset_names()])
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "+".join(changes) or "nothing")
def test_file_and_command_give_the_stream_that_is_shown(
    preset: str | None, changes: dict[str, Any], tmp_path: Path
) -> None:
    own = settings_of({"state_dir": "here", "tumbling_s": 10, "slide_s": 10, "sliding_s": 30})
    shown = (preset_values(preset, own) if preset else shown_values(own)) | {"clock_skew": ""} | changes
    if shown["partitions"] == 1:
        shown |= {"silent": ""}
    composed = compose(own, shown, preset)
    file = tmp_path / "stream.toml"
    file.write_text(composed.file)
    assert load_settings(file) == composed.settings
    assert load_settings(**given_to_run(composed.command)) == composed.settings
    for name, value in changes.items():
        if name != "drift":
            assert str(getattr(composed.settings, name) or "").removesuffix(".0") == str(value)
    assert composed.settings.tumbling_s == 10
    if changes == {} and preset == "late-data":
        assert 'preset = "late-data"' in composed.file and "late_share" not in composed.file


def test_nothing_of_a_preset_that_was_taken_back_is_left() -> None:
    for preset in ("drift", "review-bomb", "launch-night"):
        shown = preset_values(preset, OWN) | {"drift": "", "attack": "", "plan": ""}
        composed = compose(OWN, shown, preset)
        assert (composed.settings.drift, composed.settings.attack, composed.settings.plan) == ((), (), None)
        assert load_settings(**given_to_run(composed.command)) == composed.settings


def test_another_stream_has_nothing_in_common_with_the_one_in_force() -> None:
    login = {"sasl_mechanism": "PLAIN", "sasl_username": "me", "sasl_password": "a-secret-password"}
    own = settings_of(
        {
            "bootstrap_servers": "kafka:9092",
            "security_protocol": "SASL_SSL",
            **login,
            "checkpoint": "hdfs://c/x",
            "control_token": "a-secret-of-some-length",
        }
    )
    composed = compose(own, shown_values(own) | {"seed": "7"})
    new = composed.settings
    assert new.bootstrap_servers == "kafka:9092"
    for name in Settings.model_fields:
        if name.endswith("_topic") or name in ("state_dir", "checkpoint"):
            assert getattr(new, name) != getattr(own, name)
    assert (new.api_port, new.ui_port) == (0, 0)
    assert "secret" not in composed.file + composed.command
    assert "--security-protocol SASL_SSL" in composed.command and "--sasl-username me" in composed.command


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"user_bias_share": 0.9}, "user_bias_share + movie_bias_share + factor_share is more than 1"),
        ({"users": 0}, "setting users (number of users; ids are 1 … users): 0 should be greater than or equal to 1"),
        ({"users": 2.5}, "setting users"),
        ({"users": None}, "setting users"),
        ({"seed": "some"}, "setting seed"),
        ({"plan": "ramp("}, "setting plan"),
        ({"silent": "9:every=600s,for=120s"}, "silent names partition 9"),
        ({"drift": "abrupt"}, "setting drift"),
    ],
)
def test_wrong_values_get_the_error_of_the_settings_model(changes: dict[str, Any], named: str) -> None:
    shown = shown_values(OWN) | changes
    with pytest.raises(ConfigurationError) as caught:
        compose(OWN, shown)
    assert named in str(caught.value)
    panel = workload()
    assert panel.told("", *shown.values()) == (fragments.problem(str(caught.value)), "")
    assert panel.preview("", *shown.values()) == ""


def test_the_environment_of_the_page_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_PIPELINE_SEED", "8")
    assert compose(OWN, shown_values(OWN)).settings.seed == 42


@pytest.mark.parametrize("name", SHOWN_FIELDS)
def test_a_turned_setting_shows_in_the_preview(name: str, tmp_path: Path) -> None:
    said, real = ({"users": 2_000, "movies": 400} | changes for changes in with_turned(name, tmp_path))
    first, other = load_settings(**said), load_settings(**real)
    span = max(span_of(first), span_of(other))
    before, after = preview(first, span), preview(other, span)
    assert fragments.compared(before, after) != fragments.compared(before, before)


def test_what_is_declared_is_what_the_preview_measures() -> None:
    changes = {"late_share": 0.2, "late_law": "fixed", "late_mean_s": 30.0, "malformed_share": 0.1, "drop_share": 0.05}
    settings = settings_of({**changes, "duplicate_share": 0.1, "arrivals": "poisson", "rate": 250.0})
    found = preview(settings, span_of(settings))
    assert found.records == pytest.approx(20_000, rel=0.03)  # at random
    assert found.rate == pytest.approx(250.0)
    assert found.burstiness == pytest.approx(1.0, abs=0.1)
    assert found.off_by_s == pytest.approx(30.0)
    assert found.off_time == pytest.approx(0.2, abs=0.01)
    assert found.unreadable == pytest.approx(0.1, abs=0.01)
    assert found.repeated == pytest.approx(0.1, abs=0.01)
    assert found.lost == pytest.approx(0.05, abs=0.01)
    assert found.stars.sum() == pytest.approx(1.0)
    plain = preview(settings_of({"session_length": 4.0}), 20_000)
    assert plain.session == pytest.approx(4.0, rel=0.1)
    assert plain.explained == pytest.approx(0.7, abs=0.06) and plain.mean == pytest.approx(3.45, abs=0.05)


def test_drift_and_attack_far_into_the_stream_are_in_the_sample() -> None:
    drifting = settings_of({"users": 2_000, "movies": 400, "drift": ["abrupt at=1_000_000 size=-2"]})
    course = preview(drifting, span_of(drifting)).course
    assert course[0] > 3.2 and course[-1] < 2.2


@pytest.mark.parametrize(
    "huge", [{"users": 2**31 - 1}, {"partitions": 10_000}, {"duplicate_share": 0.9, "duplicate_distance": 100_000}]
)
def test_what_would_take_long_is_said_and_can_be_started_all_the_same(huge: dict[str, Any]) -> None:
    shown = shown_values(OWN) | {"drift": "abrupt at=900_000_000 size=1"} | huge
    panel = workload()
    assert "too large for a preview" in panel.preview("", *shown.values())
    assert "ray-pipeline run" in panel.told("", *shown.values())[1]


def test_a_plan_that_ends_soon_has_a_preview_of_what_there_is() -> None:
    panel = workload()
    assert "and 50 records" in panel.preview("", *(shown_values(OWN) | {"plan": "5 for 10s"}).values())
    assert "no rating at all" in panel.preview("", *(shown_values(OWN) | {"plan": "0.0001 for 1h"}).values())


def test_controls_begin_with_what_is_in_force_whoever_changed_it() -> None:
    store = MetricsStore(("tumbling_1min",))
    panel = workload(store=store)
    assert panel.fill() == ["", *shown_values(OWN).values()]
    started = OWN.model_copy(update={"late_share": 0.25})
    digest = load_catalogue(started).digest
    run = {"run": "r", "config": started.digest(digest), "catalogue": digest, "settings": started.event_settings()}
    store.progress("run", run, NOW)
    store.progress("generator", {"run": "r", "state": "running", "target_rate": 420.0, "plan": None}, NOW)
    found = dict(zip(SHOWN_FIELDS, panel.fill()[1:], strict=True))
    assert (found["rate"], found["late_share"], found["plan"]) == (420.0, 0.25, "")
    store.progress("generator", {"run": "r", "state": "running", "target_rate": 0.0, "plan": "9 for 1m then 7"}, NOW)
    assert dict(zip(SHOWN_FIELDS, panel.fill()[1:], strict=True))["plan"] == "9 for 1m then 7"
    assert "values of the stream in force" in panel.told(*panel.fill())[0]


def test_beside_a_fitted_model_its_settings_stand_still(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    write_fitted(path, small_model())
    own = load_settings(model=path, state_dir="here")
    made = controls(own)
    for name in SHOWN_FIELDS:
        assert made[name].interactive == (name not in REPLACED_FIELDS)
    assert "fitted model" in made["users"].info
    composed = compose(own, preset_values("late-data", own) | {"seed": "7"}, "late-data")
    assert composed.settings.users == own.users and composed.settings.late_share == 0.05
    file = tmp_path / "stream.toml"
    file.write_text(composed.file)
    assert load_settings(file) == composed.settings
    panel = workload(own)
    assert "in force" in panel.preview(*panel.fill())


def test_a_model_file_that_is_not_here_is_asked_for() -> None:
    store = MetricsStore(("tumbling_1min",))
    run = {"run": "r", "config": OWN.digest("fitted-0"), "catalogue": "fitted-0", "settings": OWN.event_settings()}
    store.progress("run", run, NOW)
    panel = workload(store=store)
    assert "--model" in panel.told(*panel.fill())[0]


def test_what_somebody_writes_is_escaped() -> None:
    shown = shown_values(OWN) | {"clock_skew": "<script>"}
    assert "<script>" not in "".join(workload().told("", *shown.values()))
