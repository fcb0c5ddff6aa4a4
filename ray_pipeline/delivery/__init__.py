"""Delivery of a shard's ratings: the interface, the transactional and the idempotent way, and a double in memory."""
