"""The verifying stage: what checks the pipeline, in a process of its own. Plain class; an actor where it is started."""

from __future__ import annotations

from typing import Any

from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.verification.oracle import OracleStage

__all__ = ["VerificationStage"]


class VerificationStage:
    """Runs the oracle.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        clock: tells the time.
    """

    def __init__(self, settings: Settings, bootstrap: str, clock: Clock | None = None) -> None:
        self._oracle = OracleStage(settings, bootstrap, clock)

    def start(self) -> None:
        """Begin; returns at once."""
        self._oracle.start()

    def status(self) -> dict[str, Any]:
        """State and reason, and how far it is."""
        return self._oracle.status()

    def stop(self, deadline_s: float = 30.0) -> None:
        """Work off what is there, and end."""
        self._oracle.stop(deadline_s)
