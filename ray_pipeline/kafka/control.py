"""Commands to a running generator, over a topic: so they work from any machine that reaches the broker."""

from __future__ import annotations

import json
import logging
import time
import uuid
from typing import Any

from confluent_kafka import OFFSET_END, Consumer, KafkaError, TopicPartition

from ray_pipeline.errors import BrokerUnavailableError
from ray_pipeline.kafka.client import make_consumer, make_producer, watermark_offsets
from ray_pipeline.kafka.read import FOLLOWED_MS

__all__ = ["COMMANDS", "ControlFeed", "send_command"]

_log = logging.getLogger(__name__)

COMMANDS = ("rate", "plan", "pause", "resume", "scale", "lend", "keep", "return", "stop")
_KEY = b"control"


def send_command(
    bootstrap: str,
    topic: str,
    command: str,
    rate: float | None = None,
    timeout_s: float = 15.0,
    actors: int | None = None,
    plan: str | None = None,
    **more: Any,
) -> str:
    """Send a command.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topic: the control topic.
        command: one of :data:`COMMANDS`.
        rate: ratings per second, for ``rate``.
        timeout_s: how long to wait for the broker, seconds.
        actors: how many generator actors, for ``scale``.
        plan: text of the rate plan, for ``plan``.
        more: ``events``, how many ratings, for ``lend``; ``loan``, the id of that command, for ``keep`` and ``return``.

    Returns:
        The command's id: the generator's status has it in ``answers`` when it was obeyed, or refused.

    Raises:
        BrokerUnavailableError: the broker did not take it in time.
    """
    if command not in COMMANDS:
        msg = f"unknown command {command!r}"
        raise ValueError(msg)
    identity = uuid.uuid4().hex[:12]
    record: dict[str, Any] = {"id": identity, "command": command, "at_ms": time.time_ns() // 1_000_000, **more}
    if rate is not None:
        record["rate"] = rate
    if actors is not None:
        record["actors"] = actors
    if plan is not None:
        record["plan"] = plan
    failures: list[str] = []
    producer = make_producer(bootstrap, message_timeout_ms=int(timeout_s * 1000))
    producer.produce(
        topic,
        key=_KEY,
        value=json.dumps(record).encode(),
        on_delivery=lambda error, _: failures.append(error.str()) if error else None,
    )
    if producer.flush(timeout_s + 1) or failures:
        raise BrokerUnavailableError(
            problem=f"the command did not reach topic {topic} at {bootstrap} ({failures or 'no answer'})",
            fix="Check that the pipeline is running",
        )
    return identity


class ControlFeed:
    """The commands that come in from now on.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topic: the control topic; it must exist.
    """

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._consumer: Consumer = make_consumer(bootstrap, auto_offset_reset="error", fetch_wait_max_ms=FOLLOWED_MS)
        # pinned now: an offset looked up later would skip commands sent in between
        _, end = watermark_offsets(self._consumer, topic, 0)
        self._consumer.assign([TopicPartition(topic, 0, end if end >= 0 else OFFSET_END)])

    def poll(self) -> list[dict[str, Any]]:
        """What came in since the last call; does not wait."""
        commands = []
        for message in self._consumer.consume(100, timeout=0):
            error = message.error()
            if error is not None:
                if error.code() != KafkaError._PARTITION_EOF:
                    _log.warning("control topic: %s", error)
                continue
            try:
                record = json.loads(message.value() or b"")
            except ValueError:
                record = {"command": "not JSON"}
            commands.append(record if isinstance(record, dict) else {"command": "not a JSON object"})
        return commands

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.close()
