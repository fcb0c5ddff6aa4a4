"""The delivery that the settings name."""

from __future__ import annotations

import functools
import logging

from ray_pipeline.config import Settings
from ray_pipeline.delivery.columns import ColumnSender
from ray_pipeline.delivery.idempotent import IdempotentDelivery
from ray_pipeline.delivery.interface import ShardDelivery
from ray_pipeline.delivery.librdkafka import obstacle
from ray_pipeline.delivery.sending import RecordSender
from ray_pipeline.delivery.transactional import TransactionalDelivery
from ray_pipeline.formats.factory import open_format

__all__ = ["fallback", "open_delivery"]

_log = logging.getLogger(__name__)


def fallback(settings: Settings) -> str | None:
    """What is to be said when the settings ask for fast delivery and this process cannot do it; else None."""
    return _fallback() if settings.fast else None


@functools.cache
def _fallback() -> str | None:
    """Checked once a process, and logged once."""
    found = obstacle()
    if found is None:
        return None
    line = f"fast delivery is not possible here: {found}; plain delivery is used"
    _log.warning("%s", line)
    return line


def open_delivery(settings: Settings, bootstrap: str, partition: int) -> ShardDelivery:
    """A fresh delivery of one shard, not opened yet."""
    place = (bootstrap, settings.ratings_topic, settings.progress_topic, partition, settings.partitions)
    wire = open_format(settings)
    if settings.delivery == "at-least-once":
        return IdempotentDelivery(*place, wire)
    by_columns = settings.fast and fallback(settings) is None
    make_sender = ColumnSender if by_columns else functools.partial(RecordSender, wire=wire)
    return TransactionalDelivery(*place, make_sender, wire)
