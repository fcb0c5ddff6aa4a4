"""Predictions that come over HTTP, on their way to Kafka."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from confluent_kafka import Producer

from ray_pipeline.config import Settings
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.truth.scoring import Prediction

__all__ = ["PredictionQueue", "QueueFull"]

_log = logging.getLogger(__name__)

_WAITING_MOST = 50_000


class QueueFull(Exception):
    """The broker takes predictions more slowly than they come."""


class PredictionQueue:
    """Sends predictions without waiting; bounded. Ask it from one thread at a time, or from one event loop.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
    """

    def __init__(self, settings: Settings, bootstrap: str) -> None:
        self.lost = 0
        self._topic = settings.predictions_topic
        self._bootstrap = bootstrap
        self._made: Producer | None = None

    def put(self, predictions: Sequence[Prediction]) -> None:
        """Queue all of them, or none.

        Raises:
            QueueFull: there is no room.
        """
        producer = self._producer()
        producer.poll(0)
        if len(producer) + len(predictions) > _WAITING_MOST:
            raise QueueFull(f"{len(producer):,} predictions wait for the broker, {_WAITING_MOST:,} at most: try again")
        for model, user, movie, stars, time_ms in predictions:
            value = {"userId": user, "movieId": movie, "prediction": stars, "timestamp": time_ms, "model": model}
            data = json.dumps(value, separators=(",", ":")).encode()
            producer.produce(self._topic, key=model.encode(), value=data, on_delivery=self._delivered)

    def waiting(self) -> int:
        """How many the broker has not taken yet."""
        if self._made is None:
            return 0
        self._made.poll(0)
        return len(self._made)

    def close(self, deadline_s: float = 10.0) -> None:
        """Wait for what is queued, at most ``deadline_s`` seconds."""
        left = self._made.flush(deadline_s) if self._made is not None else 0
        if left:
            _log.warning("%d predictions were not delivered within %.0f s", left, deadline_s)

    def _producer(self) -> Producer:
        self._made = self._made or make_producer(self._bootstrap, message_timeout_ms=60_000)
        return self._made

    def _delivered(self, error: Any, _: Any) -> None:
        if error is not None:
            self.lost += 1
            _log.warning("a prediction was not delivered (%d so far): %s", self.lost, error.str())
