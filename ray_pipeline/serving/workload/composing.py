"""From what the controls show to settings, and to the file and the command that start this stream beside the one in force."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from ray_pipeline.config import EVENT_FIELDS, FORMAT_FIELDS, SECURITY_FIELDS, Settings, flags_of, settings_of
from ray_pipeline.fitted import REPLACED_FIELDS
from ray_pipeline.knobs import knob_of

__all__ = ["SHOWN_FIELDS", "Composed", "compose", "in_force", "locked_fields", "preset_values", "shown_values"]

SHOWN_FIELDS = tuple(name for name in Settings.model_fields if name in {"rate", "plan", *EVENT_FIELDS})
"""The settings that have a control: what an event or its rate is a function of, in the model's order."""

# settings of the stream in force that go with it to another one; how windows are cut among them, so that both can be compared
_TAKEN_OVER = (
    "model",
    "catalog",
    *FORMAT_FIELDS,
    "schema_registry_url",
    "bootstrap_servers",
    *SECURITY_FIELDS,
    "ray_address",
    "tumbling_s",
    "sliding_s",
    "slide_s",
    "watermark_s",
    "max_ahead_s",
)
_TOPICS = tuple(name for name in Settings.model_fields if name.endswith("_topic"))


@dataclass(frozen=True, slots=True)
class Composed:
    """A stream that somebody has put together.

    Attributes:
        settings: all its settings.
        changed: the controls' settings that differ from those in force, with both values.
        file: a settings file that gives them, TOML: what differs from defaults and preset.
        command: the command line that does the same.
    """

    settings: Settings
    changed: Mapping[str, tuple[Any, Any]]
    file: str
    command: str


def in_force(found: Settings, generator: Mapping[str, Any]) -> Settings:
    """The settings of the stream that runs.

    Args:
        found: those that it was started with.
        generator: record ``generator`` of topic ``ratings.progress``: to what its rate was changed since.
    """
    if generator.get("plan"):
        return found.model_copy(update={"plan": generator["plan"], "rate": Settings.model_fields["rate"].default})
    if generator.get("target_rate"):
        return found.model_copy(update={"plan": None, "rate": float(generator["target_rate"])})
    return found


def locked_fields(settings: Settings) -> dict[str, str]:
    """The settings that cannot be changed here, and who says their values."""
    if settings.model is not None:
        return dict.fromkeys(REPLACED_FIELDS, "comes from the fitted model")
    return {"movies": "comes from the catalogue's file"} if settings.catalog is not None else {}


def shown_values(settings: Settings) -> dict[str, Any]:
    """What the controls show of some settings: several texts as lines, what is not set as nothing, a huge number as text."""
    return {name: _shown(name, getattr(settings, name)) for name in SHOWN_FIELDS}


def preset_values(preset: str, present: Settings) -> dict[str, Any]:
    """What the controls show of a preset; what is locked stays as it is.

    Raises:
        ConfigurationError: there is no such preset.
    """
    found, kept = shown_values(settings_of({"preset": preset})), shown_values(present)
    return {name: kept[name] if name in locked_fields(present) else value for name, value in found.items()}


def compose(present: Settings, shown: Mapping[str, Any], preset: str | None = None) -> Composed:
    """The stream that the controls describe.

    Args:
        present: settings of the stream in force; see :func:`in_force`.
        shown: value of each control.
        preset: the preset that the file may name.

    Raises:
        ConfigurationError: these values are no settings; names the setting and the fix.
    """
    locked = locked_fields(present)
    given = {name: _given(name, value) for name, value in shown.items() if name not in locked}
    # a plan stands in place of the rate
    given.pop("rate" if given["plan"] is not None else "plan")
    taken = {name: getattr(present, name) for name in _TAKEN_OVER if _is_set(present, name)}
    taken["actors"] = _fewer(present.actors, given.get("partitions"))
    base = settings_of({"preset": preset}) if preset else None
    if base is None or locked or any(not given.get(name) and getattr(base, name) for name in ("drift", "attack")):
        # no preset beside a model file, and on the command line a list is not emptied: the values themselves are told
        base, preset = settings_of({name: taken[name] for name in ("model", "catalog") if name in taken}), None
    named = {"preset": preset} if preset else {}
    first = settings_of({**named, **taken, **given})
    place = _place(present, first)
    settings = settings_of({**named, **taken, **given, **place})
    differing = {
        name: getattr(settings, name)
        for name in {**taken, **given, **place}
        if getattr(settings, name) != getattr(base, name)
        or name in ("model", "catalog")
        or (name == "rate" and base.plan is not None)
    }
    # whoever reads the page need not know it; who starts the stream is asked for it
    differing.pop("sasl_password", None)
    told = {**named, **{name: differing[name] for name in Settings.model_fields if name in differing}}
    before, after = shown_values(present), shown_values(settings)
    changed = {name: (before[name], after[name]) for name in SHOWN_FIELDS if before[name] != after[name]}
    return Composed(settings, changed, _file(told), _command(told))


def _place(present: Settings, new: Settings) -> dict[str, Any]:
    """Where the new stream is kept, so that it has nothing in common with the one in force."""
    name = new.digest(str(new.model or new.catalog or ""))[:8]
    place: dict[str, Any] = {
        "state_dir": Path(f"{present.state_dir}-{name}"),
        "api_port": 0,
        "ui_port": 0,
    }
    if present.checkpoint is not None:
        place["checkpoint"] = f"{present.checkpoint.rstrip('/')}-{name}"
    if present.bootstrap_servers is not None:
        place |= {topic: f"{getattr(present, topic)}-{name}" for topic in _TOPICS}
    return place


def _is_set(settings: Settings, name: str) -> bool:
    return bool(getattr(settings, name) != Settings.model_fields[name].default)


def _fewer(actors: int, partitions: Any) -> int:
    """As many actors as there can be: the page has no control for them."""
    return min(actors, int(partitions)) if isinstance(partitions, (int, float)) and partitions >= 1 else actors


def _shown(name: str, value: Any) -> Any:
    knob = knob_of(name)
    if knob.kind == "texts":
        return "\n".join(value)
    return value if value is not None else ""


def _given(name: str, shown: Any) -> Any:
    """A setting's value from what its control shows."""
    knob = knob_of(name)
    if knob.kind == "texts":
        return tuple(part.strip() for line in str(shown or "").splitlines() for part in line.split(";") if part.strip())
    if knob.default is None and (shown is None or not str(shown).strip()):
        return None
    return shown


def _file(told: Mapping[str, Any]) -> str:
    plain = {n: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for n, v in told.items()}
    return tomli_w.dumps(plain)


def _command(told: Mapping[str, Any]) -> str:
    return shlex.join(["ray-pipeline", "run", *flags_of(told)])
