"""Settings that belong together, by name: one readable TOML file each, whose first comment line says what it is for."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

from ray_pipeline.errors import ConfigurationError

__all__ = ["load_preset", "preset_names", "preset_purpose"]


def preset_names() -> tuple[str, ...]:
    """The names of all presets, sorted."""
    return tuple(sorted(f.name.removesuffix(".toml") for f in files(__name__).iterdir() if f.name.endswith(".toml")))


def load_preset(name: str) -> dict[str, Any]:
    """The settings of a preset, as they stand in its file.

    Raises:
        ConfigurationError: there is no such preset; names those there are.
    """
    return tomllib.loads(_text(name))


def preset_purpose(name: str) -> str:
    """What a preset is for: the first line of its file.

    Raises:
        ConfigurationError: there is no such preset; names those there are.
    """
    return _text(name).partition("\n")[0].removeprefix("# ")


def _text(name: str) -> str:
    if name not in preset_names():
        raise ConfigurationError(f"preset {name!r} does not exist", f"The presets are: {', '.join(preset_names())}")
    return files(__name__).joinpath(f"{name}.toml").read_text("utf-8")
