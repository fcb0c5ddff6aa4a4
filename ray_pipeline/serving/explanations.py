"""Explanations on request: one at a time, from what the run published lately."""

from __future__ import annotations

import threading
from typing import Any

from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.verification.explain import Explainer

__all__ = ["Explanations"]

_FRESH_MS = 5_000


class Explanations:
    """Asks an :class:`Explainer`, which is made when it is first needed.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        clock: tells the time.
    """

    def __init__(self, settings: Settings, bootstrap: str, clock: Clock) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._clock = clock
        self._lock = threading.Lock()
        self._explainer: Explainer | None = None
        self._read_ms = 0

    def by_index(self, partition: int, index: int) -> dict[str, Any]:
        """See :meth:`Explainer.by_index`."""
        with self._lock:
            return self._fresh().by_index(partition, index)

    def by_offset(self, partition: int, offset: int) -> dict[str, Any]:
        """See :meth:`Explainer.by_offset`."""
        with self._lock:
            return self._fresh().by_offset(partition, offset)

    def _fresh(self) -> Explainer:
        now_ms = self._clock.now_ms()
        if self._explainer is None:
            self._explainer = Explainer(self._settings, self._bootstrap)
        elif now_ms - self._read_ms > _FRESH_MS:
            self._explainer.refresh()
        else:
            return self._explainer
        self._read_ms = now_ms
        return self._explainer
