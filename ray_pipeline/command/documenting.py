"""``docs/settings.md``: every setting, from the settings model. ``python -m ray_pipeline.command.documenting FILE`` writes it."""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from ray_pipeline.config import ENVIRONMENT_PREFIX, EVENT_FIELDS, Settings, flag_of
from ray_pipeline.conformance.registry import NOT_OF_THE_DATA, checks_of

__all__ = ["settings_page"]

_HEAD = f"""# Settings

Every setting, made from the settings model (`ray_pipeline/config.py`) by `make settings`. A flag beats the environment
(`{ENVIRONMENT_PREFIX}NAME`), which beats the file (`--config FILE`: TOML, `name = value`), which beats the preset. Settings in bold are
what an event is a function of. The last column names the checks of [`ray-pipeline conformance`](conformance.md) that judge the
setting, or says why there is none.

| setting | flag | range | default | meaning | conformance |
|---|---|---|---|---|---|
"""


def settings_page() -> str:
    """The page, Markdown."""
    return _HEAD + "".join(_row(name, field) for name, field in Settings.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    label = f"**`{name}`**" if name in EVENT_FIELDS else f"`{name}`"
    cells = (label, f"`{flag_of(name)}`", _range(field), _default(field), field.description or "", _judged_by(name))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _judged_by(name: str) -> str:
    checks = checks_of(name)
    if checks:
        return ", ".join(check.name for check in checks)
    return "– " + next(reason for reason, names in NOT_OF_THE_DATA.items() if name in names)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "per user"
    return (
        "–"
        if field.default is None
        else f"`{str(field.default).lower() if field.annotation is bool else field.default}`"
    )


def _range(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{option}`" for option in typing.get_args(annotation))
    if annotation is bool:
        return "`true`, `false`"
    bounds = {kind: _bound(field, kind) for kind in ("ge", "gt", "le", "lt")}
    low = f"{bounds['ge']}" if bounds["ge"] is not None else "" if bounds["gt"] is None else f"> {bounds['gt']}"
    high = f"{bounds['le']}" if bounds["le"] is not None else "" if bounds["lt"] is None else f"< {bounds['lt']}"
    kind = {int: "whole number", float: "number", Path: "path"}.get(annotation, "text")
    return f"{kind} {low} … {high}".strip() if low or high else kind


def _bound(field: FieldInfo, kind: str) -> Any:
    value = next((getattr(m, kind) for m in field.metadata if hasattr(m, kind)), None)
    return f"{value:,}" if isinstance(value, (int, float)) else value


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(settings_page(), encoding="utf-8")
