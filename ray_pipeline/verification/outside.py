"""Which ratings came from outside, read from Kafka as far as it is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from ray_pipeline.codec import parse_object
from ray_pipeline.config import Settings
from ray_pipeline.formats.factory import open_format
from ray_pipeline.kafka.growing import GrowingTopic
from ray_pipeline.kafka.read import Record
from ray_pipeline.truth.outside import OutsideRatings

__all__ = ["OutsideLedger", "own_records"]

_log = logging.getLogger(__name__)

_AT_ONCE = 10_000


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
                self.ratings.add(parse_object(record.value))
            except ValueError as error:  # somebody else's record
                _log.warning("%s, offset %d, is passed over: %s", record.topic, record.offset, error)
        return self.ratings

    def close(self) -> None:
        """Let go of the broker."""
        self._topic.close()


def own_records(settings: Settings, bootstrap: str, records: Iterator[Record]) -> Iterator[Record]:
    """Records of the ratings' topic without those that came from outside, their values in the contract's form.

    Args:
        settings: the run's.
        bootstrap: brokers, HOST:PORT[,…].
        records: as they were read.
    """
    ledger, wire = OutsideLedger(settings, bootstrap), open_format(settings)
    try:
        while several := list(islice(records, _AT_ONCE)):
            outside = ledger.refresh()
            for record, value in zip(several, wire.from_wire([r.value for r in several]), strict=True):
                if outside.before(record.partition, record.offset) == outside.before(
                    record.partition, record.offset + 1
                ):
                    yield replace(record, value=value)
    finally:
        ledger.close()
