"""What a window is: its length, its slide, its name."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from math import gcd

from ray_pipeline.config import Settings

__all__ = ["Panes", "WindowSpec", "epoch_ms", "iso_ms", "window_specs"]

_UNITS = (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1_000))


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """Windows of one kind: ``[k · slide, k · slide + size)`` for every whole k, aligned to the epoch.

    Attributes:
        size_ms: length, milliseconds, a multiple of ``slide_ms``.
        slide_ms: distance between starts, milliseconds.
    """

    size_ms: int
    slide_ms: int

    @property
    def tumbling(self) -> bool:
        """Whether windows do not overlap."""
        return self.size_ms == self.slide_ms

    @property
    def name(self) -> str:
        """Such as ``tumbling_1min`` or ``sliding_5min_1min``."""
        size = _length(self.size_ms)
        return f"tumbling_{size}" if self.tumbling else f"sliding_{size}_{_length(self.slide_ms)}"


@dataclass(frozen=True, slots=True)
class Panes:
    """The pieces of time that all windows are made of: each window is a number of whole panes.

    Attributes:
        specs: the window kinds.
    """

    specs: tuple[WindowSpec, ...]

    @property
    def size_ms(self) -> int:
        """Length of a pane, milliseconds."""
        return gcd(*(spec.size_ms for spec in self.specs), *(spec.slide_ms for spec in self.specs))

    def windows_of(self, pane_ms: int) -> list[tuple[int, int]]:
        """The windows that a pane is part of, as (kind, end in epoch milliseconds).

        Args:
            pane_ms: its start, epoch milliseconds.
        """
        return [
            (kind, end_ms)
            for kind, spec in enumerate(self.specs)
            for end_ms in range(
                pane_ms - pane_ms % spec.slide_ms + spec.slide_ms, pane_ms + spec.size_ms + 1, spec.slide_ms
            )
        ]


def _length(ms: int) -> str:
    return next((f"{ms // unit}{name}" for name, unit in _UNITS if ms % unit == 0), f"{ms}ms")


def window_specs(settings: Settings) -> tuple[WindowSpec, ...]:
    """The kinds of windows that the settings ask for; the first one is tumbling."""
    tumbling = WindowSpec(settings.tumbling_s * 1000, settings.tumbling_s * 1000)
    sliding = WindowSpec(settings.sliding_s * 1000, settings.slide_s * 1000)
    return (tumbling,) if sliding == tumbling else (tumbling, sliding)


def iso_ms(at_ms: int) -> str:
    """ISO-8601 in UTC with milliseconds, such as ``2026-01-31T12:00:00.000Z``."""
    seconds, ms = divmod(at_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{ms:03d}Z"


def epoch_ms(iso: str) -> int:
    """Epoch milliseconds of an ISO-8601 time with a zone, such as :func:`iso_ms` writes."""
    return round(datetime.fromisoformat(iso).timestamp() * 1000)
