"""Commands about what ratings are made of."""

from __future__ import annotations

import typer

from ray_pipeline.command.options import JSON, emit_json
from ray_pipeline.presets import load_preset, preset_names, preset_purpose

__all__ = ["presets"]


def presets(as_json: JSON = False) -> None:
    """List the presets: settings that belong together, for --preset NAME."""
    if as_json:
        emit_json({name: {"purpose": preset_purpose(name), "settings": load_preset(name)} for name in preset_names()})
        return
    for name in preset_names():
        typer.echo(f"{name:<14}{preset_purpose(name)}")
