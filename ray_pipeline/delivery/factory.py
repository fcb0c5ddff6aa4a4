"""The delivery that the settings name."""

from __future__ import annotations

from ray_pipeline.config import Settings
from ray_pipeline.delivery.idempotent import IdempotentDelivery
from ray_pipeline.delivery.interface import ShardDelivery
from ray_pipeline.delivery.transactional import TransactionalDelivery

__all__ = ["open_delivery"]


def open_delivery(settings: Settings, bootstrap: str, partition: int) -> ShardDelivery:
    """A fresh delivery of one shard, not opened yet."""
    kind = TransactionalDelivery if settings.delivery == "exactly-once" else IdempotentDelivery
    return kind(bootstrap, settings.ratings_topic, settings.progress_topic, partition)
