"""``docs/settings.md``: every setting, from the settings model. ``python -m ray_pipeline.command.documenting FILE`` writes it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from ray_pipeline.config import ENVIRONMENT_PREFIX, EVENT_FIELDS, Settings, flag_of
from ray_pipeline.conformance.registry import NOT_OF_THE_DATA, checks_of
from ray_pipeline.knobs import Knob, knob_of

__all__ = ["settings_page"]

_HEAD = f"""# Settings

Every setting, made from the settings model (`ray_pipeline/config.py`) by `make settings`. A flag beats the environment
(`{ENVIRONMENT_PREFIX}NAME`), which beats the file (`--config FILE`: TOML, `name = value`), which beats the preset. Settings in bold are
what an event is a function of. The last column names the checks of [`ray-pipeline conformance`](conformance.md) that judge the
setting, or says why there is none.
"""

_COLUMNS = """| setting | flag | range | default | meaning | conformance |
|---|---|---|---|---|---|
"""


def settings_page() -> str:
    """The page, Markdown."""
    groups = itertools.groupby(map(knob_of, Settings.model_fields), lambda knob: knob.group)
    return _HEAD + "".join(f"\n## {group}\n\n{_COLUMNS}{''.join(map(_row, knobs))}" for group, knobs in groups)


def _row(knob: Knob) -> str:
    label = f"**`{knob.name}`**" if knob.name in EVENT_FIELDS else f"`{knob.name}`"
    cells = (label, f"`{flag_of(knob.name)}`", _range(knob), _default(knob), knob.help, _judged_by(knob.name))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _judged_by(name: str) -> str:
    checks = checks_of(name)
    if checks:
        return ", ".join(check.name for check in checks)
    return "– " + next(reason for reason, names in NOT_OF_THE_DATA.items() if name in names)


def _default(knob: Knob) -> str:
    if Settings.model_fields[knob.name].default_factory is not None:
        return "per user"
    if knob.default is None:
        return "–"
    return f"`{str(knob.default).lower() if knob.kind == 'flag' else knob.default}`"


def _range(knob: Knob) -> str:
    if knob.kind == "choice":
        return ", ".join(f"`{option}`" for option in knob.choices)
    if knob.kind == "flag":
        return "`true`, `false`"
    kind = {"whole": "whole number", "number": "number", "path": "path"}.get(knob.kind, "text")
    return f"{kind} {knob.range}".strip()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(settings_page(), encoding="utf-8")
