"""The verifying stage: what checks the pipeline and its learners. Plain class; an actor of its own where it is started."""

from __future__ import annotations

from typing import Any

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.config import Settings
from ray_pipeline.verification.oracle import OracleStage
from ray_pipeline.verification.scoring import ScoreFeed

__all__ = ["VerificationStage"]


class VerificationStage:
    """Runs the oracle and the scoreboard.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        clock: tells the time.
    """

    def __init__(self, settings: Settings, bootstrap: str, clock: Clock | None = None) -> None:
        clock = clock or SystemClock()
        self._oracle = OracleStage(settings, bootstrap, clock)
        self._scores = ScoreFeed(settings, bootstrap, clock)

    def start(self) -> None:
        """Begin; returns at once."""
        self._oracle.start()
        self._scores.start()

    def status(self) -> dict[str, Any]:
        """``state``; ``oracle`` and ``scores``: how each stands, and why it failed if it did: the stream goes on without them."""
        return {"state": "running", "oracle": self._oracle.status(), "scores": self._scores.status()}

    def stop(self, deadline_s: float = 30.0) -> None:
        """Work off what is there, and end."""
        self._oracle.stop(deadline_s)
        self._scores.stop(deadline_s)
