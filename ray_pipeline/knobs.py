"""What a setting is to a form, a table or a command line: its kind, range, unit, help and group, read from the settings model."""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ray_pipeline.config import GROUPS, Settings

__all__ = ["Kind", "Knob", "knob_of"]

Kind = Literal["whole", "number", "choice", "flag", "path", "text", "texts"]


@dataclass(frozen=True, slots=True)
class Knob:
    """One setting, as the model declares it.

    Attributes:
        name: its name.
        kind: a whole number, a number, one of some choices, yes or no, a path, a text, or several texts.
        choices: what it may be, where it is a choice.
        low: least value; None where the model names none.
        high: greatest value.
        open_low: whether ``low`` itself is excluded.
        open_high: whether ``high`` itself is excluded.
        default: its value when nobody sets it.
        help: what it means.
        group: the group of the model that it belongs to.
    """

    name: str
    kind: Kind
    choices: tuple[Any, ...]
    low: float | None
    high: float | None
    open_low: bool
    open_high: bool
    default: Any
    help: str
    group: str

    @property
    def unit(self) -> str:
        """Unit of its number, as the name ends with it; empty for a pure one."""
        ends = {"_ms": "ms", "_s": "s", "_bytes": "bytes"}
        return next((unit for end, unit in ends.items() if self.name.endswith(end)), "")

    @property
    def range(self) -> str:
        """Its range in words: ``0 … 0.9``, ``> 0 … 1,000``; empty where the model names none."""
        low = "" if self.low is None else f"{'> ' if self.open_low else ''}{_plain(self.low)}"
        high = "" if self.high is None else f"{'< ' if self.open_high else ''}{_plain(self.high)}"
        return f"{low} … {high}".strip() if low or high else ""


def knob_of(name: str) -> Knob:
    """The knob of a setting.

    Raises:
        KeyError: there is no such setting.
    """
    field = Settings.model_fields[name]
    annotation: Any = field.annotation
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    choices = tuple(typing.cast(list[Any], extra.get("enum", [])))
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
    bounds = {kind: _bound(field.metadata, kind) for kind in ("ge", "gt", "le", "lt")}
    return Knob(
        name,
        "choice" if choices else _kind(annotation),
        choices,
        bounds["gt"] if bounds["ge"] is None else bounds["ge"],
        bounds["lt"] if bounds["le"] is None else bounds["le"],
        bounds["ge"] is None,
        bounds["le"] is None,
        field.get_default(call_default_factory=True),
        field.description or "",
        _group(name),
    )


def _plain(bound: float) -> str:
    return f"{int(bound):,}" if bound == int(bound) else f"{bound:,}"


def _kind(annotation: Any) -> Kind:
    kinds: dict[Any, Kind] = {int: "whole", float: "number", bool: "flag", Path: "path"}
    return "texts" if typing.get_origin(annotation) is tuple else kinds.get(annotation, "text")


def _bound(metadata: list[Any], kind: str) -> Any:
    return next((getattr(m, kind) for m in metadata if hasattr(m, kind)), None)


def _group(name: str) -> str:
    found = ""
    for declared in Settings.model_fields:
        found = GROUPS.get(declared, found)
        if declared == name:
            break
    return found
