"""Feeds truth from Kafka: the oracle, the audit, the scoreboard."""
