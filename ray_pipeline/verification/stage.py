"""The verifying stage: what checks the pipeline and its learners. Plain class; an actor of its own where it is started."""

from __future__ import annotations

import time
from typing import Any

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.config import Settings
from ray_pipeline.verification.answers import AnswerFeed
from ray_pipeline.verification.oracle import OracleStage
from ray_pipeline.verification.scoring import ScoreFeed

__all__ = ["VerificationStage"]


class VerificationStage:
    """Runs the oracle, the scoreboard and the answer key.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        clock: tells the time.
    """

    def __init__(self, settings: Settings, bootstrap: str, clock: Clock | None = None) -> None:
        clock = clock or SystemClock()
        self._oracle = OracleStage(settings, bootstrap, clock)
        self._scores = ScoreFeed(settings, bootstrap, clock)
        self._answers = AnswerFeed(settings, bootstrap, clock)

    def start(self) -> None:
        """Begin; returns at once."""
        self._oracle.start()
        self._scores.start()
        self._answers.start()

    def status(self) -> dict[str, Any]:
        """``state``; ``oracle``, ``scores``, ``answers``: how each stands, and why it failed if it did: the stream goes on without."""
        parts: dict[str, OracleStage | ScoreFeed | AnswerFeed] = {
            "oracle": self._oracle,
            "scores": self._scores,
            "answers": self._answers,
        }
        return {"state": "running", **{name: part.status() for name, part in parts.items()}}

    def stop(self, deadline_s: float = 30.0) -> None:
        """Work off what is there, and end."""
        end = time.monotonic() + deadline_s
        for part in (self._oracle, self._scores, self._answers):
            part.stop(max(1.0, end - time.monotonic()))
