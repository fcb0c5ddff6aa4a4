"""What all that Spark reads from Kafka is read with."""

from __future__ import annotations

from ray_pipeline.brokers import spark_options

__all__ = ["source_options"]

_ANSWER_MS = 5_000
"""How long brokers may take to say where a topic ends. Kafka's client goes on asking a leader that is gone until then, 60 s by default;
only with the next client does Spark ask the new leader, and windows wait."""
_QUESTIONS = 30
_BETWEEN_MS = 100
"""So often Spark asks, and so soon again: for two and a half minutes where nobody answers, and a few seconds where the answer is that
there is no such topic. By default it is three minutes, and three seconds."""


def source_options(bootstrap: str) -> dict[str, str]:
    """Options of Spark's Kafka source: which brokers, committed records alone, and how patient it is with brokers.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
    """
    return {
        **spark_options(bootstrap),
        "kafka.isolation.level": "read_committed",
        "kafka.request.timeout.ms": str(_ANSWER_MS),
        "kafka.default.api.timeout.ms": str(_ANSWER_MS),
        "fetchOffset.numRetries": str(_QUESTIONS),
        "fetchOffset.retryIntervalMs": str(_BETWEEN_MS),
    }
