"""Status records: JSON to a topic, the newest for each key counts."""

from __future__ import annotations

import json
import logging
from typing import Any

from ray_pipeline.kafka.client import make_producer

__all__ = ["Publisher"]

_log = logging.getLogger(__name__)


class Publisher:
    """Puts JSON records without waiting. A record that a broker does not take in time is dropped, logged and counted.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
    """

    def __init__(self, bootstrap: str) -> None:
        self.dropped = 0
        self._producer = make_producer(bootstrap, message_timeout_ms=30_000)

    def put(self, topic: str, key: str, value: dict[str, Any] | None) -> None:
        """Queue one record; None = the key is no longer."""
        data = None if value is None else json.dumps(value, separators=(",", ":")).encode()
        try:
            self._producer.produce(topic, key=key.encode(), value=data, on_delivery=self._delivered)
        except BufferError:
            self._drop(topic, "the queue is full")
        self._producer.poll(0)

    def close(self, deadline_s: float = 10.0) -> None:
        """Wait for what is queued, at most ``deadline_s`` seconds."""
        left = self._producer.flush(deadline_s)
        if left:
            _log.warning("%d status records were not delivered within %.0f s", left, deadline_s)

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._drop(message.topic(), error.str())

    def _drop(self, topic: str, reason: str) -> None:
        self.dropped += 1
        _log.warning("a status record for %s was dropped (%d so far): %s", topic, self.dropped, reason)
