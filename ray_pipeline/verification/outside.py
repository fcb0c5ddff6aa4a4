"""Which ratings came from outside, read from Kafka as far as it is needed."""

from __future__ import annotations

import json
import logging

from ray_pipeline.config import Settings
from ray_pipeline.kafka.growing import GrowingTopic
from ray_pipeline.truth.outside import OutsideRatings

__all__ = ["OutsideLedger"]

_log = logging.getLogger(__name__)


class OutsideLedger:
    """Topic ``ratings.outside``, kept up with on demand.

    Args:
        settings: name the topic.
        bootstrap: brokers, HOST:PORT[,…].
    """

    def __init__(self, settings: Settings, bootstrap: str) -> None:
        self.ratings = OutsideRatings()
        self._topic = GrowingTopic(bootstrap, settings.outside_topic)

    def refresh(self) -> OutsideRatings:
        """Take in what has been written since; afterwards every rating from outside that anybody has read is known. Blocks."""
        for record in self._topic.read_new():
            try:
                self.ratings.add(json.loads(record.value or b"null"))
            except ValueError as error:  # somebody else's record
                _log.warning("%s, offset %d, is passed over: %s", record.topic, record.offset, error)
        return self.ratings

    def close(self) -> None:
        """Let go of the broker."""
        self._topic.close()
