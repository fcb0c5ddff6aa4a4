"""Previews of streams, one at a time; what was made lately is kept."""

from __future__ import annotations

import functools
import threading

from ray_pipeline.config import EVENT_FIELDS, Settings
from ray_pipeline.conformance.preview import Preview, preview, span_of

__all__ = ["Previews"]

_KEPT = 8
_IT_IS_OF = ("rate", "plan", "model", "catalog", *EVENT_FIELDS)


class Previews:
    """Makes previews; whoever asks while one is made waits, so that the page never takes more than one processor for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made = functools.lru_cache(maxsize=_KEPT)(self._make)

    def both(self, present: Settings, changed: Settings) -> tuple[Preview, Preview]:
        """Of the stream in force and of another one, over the same span of the stream.

        Raises:
            ConfigurationError: see :func:`preview`.
        """
        span = max(span_of(present), span_of(changed))
        with self._lock:
            return self._made(_Named(present), span), self._made(_Named(changed), span)

    @staticmethod
    def _make(named: _Named, span: int) -> Preview:
        return preview(named.settings, span)


class _Named:
    """Settings that are equal to others when their previews are."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._key = tuple(getattr(settings, name) for name in _IT_IS_OF)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and self._key == other._key
