"""The one place where Kafka clients are made."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from ray_pipeline.brokers import librdkafka_settings
from ray_pipeline.errors import BrokerUnavailableError, NotAllowedError, RayPipelineError

__all__ = [
    "GROUP",
    "RIGHTS",
    "check_broker",
    "error_of",
    "make_admin",
    "make_consumer",
    "make_producer",
    "no_answer",
    "watermark_offsets",
]

_log = logging.getLogger("ray_pipeline.kafka.librdkafka")

_REFUSED_S = 1.5
_ANSWER_S = 8.0
_STARTING_S = 15.0
_LET_IN_S = 2.0
_LEADER_S = 0.4
_E = TypeVar("_E", bound=RayPipelineError)

GROUP = "ray-pipeline"
"""Of all consumers, none of which ever joins it."""
RIGHTS = "Give this user the rights that docs/brokers.md lists"
"""What to do where a broker refuses an operation."""
_TLS = "SSL"  # in the text of an error of the transport
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_RIGHTS_MISSING = (
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
)

_NO_LEADER_NOW = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError._TIMED_OUT,
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._DESTROY,  # a client whose broker died in this moment begins with it anew
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.OFFSET_NOT_AVAILABLE,
)
"""What a client says of a partition that was just made, or whose broker is just dying, gone or back."""


def _common(bootstrap: str) -> dict[str, Any]:
    return {
        **librdkafka_settings(bootstrap),
        "client.id": "ray-pipeline",
        # a restarted broker is found again within a second
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1000,
        "socket.connection.setup.timeout.ms": 5000,
        "logger": _log,
        "error_cb": lambda error: _log.debug("%s", error),
    }


def make_producer(bootstrap: str, on_delivery: Callable[[Any, Any], None] | None = None, **changes: Any) -> Producer:
    """A producer that waits for all replicas and writes each record once and in order.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        on_delivery: is called with (error, message) for each record.
        changes: librdkafka settings, with ``_`` for ``.``.
    """
    settings = {
        **_common(bootstrap),
        "enable.idempotence": True,
        "acks": "all",
        "compression.type": "lz4",
        "linger.ms": 5,
        "queue.buffering.max.messages": 100_000,
        "queue.buffering.max.kbytes": 65_536,
        "batch.num.messages": 10_000,
        **{name.replace("_", "."): value for name, value in changes.items()},
    }
    if on_delivery is not None:
        settings["on_delivery"] = on_delivery
    return Producer(settings)


def make_consumer(bootstrap: str, **changes: Any) -> Consumer:
    """A consumer of committed records, without a group's memory: it is assigned partitions by hand."""
    settings = {
        **_common(bootstrap),
        "group.id": GROUP,
        "enable.auto.commit": False,
        "isolation.level": "read_committed",
        "auto.offset.reset": "earliest",
        "enable.partition.eof": True,
        "fetch.wait.max.ms": 10,
        "fetch.error.backoff.ms": 100,
        # by default a fetcher whose queue is full looks again after a second: 100,000 records a second, however fast they are read
        "fetch.queue.backoff.ms": 20,
        # bounded: what is fetched ahead, over all partitions
        "queued.max.messages.kbytes": 32_768,
        **{name.replace("_", "."): value for name, value in changes.items()},
    }
    return Consumer(settings)


def make_admin(bootstrap: str) -> AdminClient:
    """An administration client."""
    return AdminClient(_common(bootstrap))


def watermark_offsets(consumer: Consumer, topic: str, partition: int, timeout_s: float = 15.0) -> tuple[int, int]:
    """First offset and end of a partition; waits for one without a leader: just made, or its broker just back, or gone for good.

    Raises:
        KafkaException: not within ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    # a client asks the leader that it knows of, and goes on asking it when it is gone
    once_s, again = max(_LEADER_S, timeout_s / 3), False
    while True:
        try:
            if again:
                consumer.list_topics(topic, timeout=once_s)  # who leads the partition is asked for again
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=min(once_s, timeout_s))
        except KafkaException as error:
            if error.args[0].code() not in _NO_LEADER_NOW or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
            again = True
        else:
            return low, high


def check_broker(bootstrap: str, timeout_s: float | None = None, *, starting: bool = False) -> None:
    """Make sure that a broker answers.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        timeout_s: how long one may take, seconds; None = 8, so that a command ends within 15, or 15 for one that is starting.
        starting: whether it may be on its way up, as one that a pipeline of this machine starts again. Otherwise nobody need be
            waited for where this machine itself says, for 1.5 s, that nobody listens there.

    Raises:
        BrokerUnavailableError: none does.
    """
    began, most_s = time.monotonic(), timeout_s or (_STARTING_S if starting else _ANSWER_S)
    while not starting and _refused_here(bootstrap):
        if time.monotonic() > began + _REFUSED_S:
            raise no_answer(bootstrap, "connection refused")
        time.sleep(0.1)
    said: list[KafkaError] = []
    config: dict[str, Any] = {**_common(bootstrap), "error_cb": said.append}
    admin = AdminClient(config)
    rest_s = max(1.0, began + most_s - time.monotonic())
    # one that is starting may not know its users yet; any other need not be waited for once it has said no
    for wait_s in (rest_s,) if starting else (_LET_IN_S, rest_s - _LET_IN_S):
        try:
            admin.list_topics(timeout=max(1.0, wait_s))
        except KafkaException as error:
            admin.poll(0)  # only now it hands over what it has to say
            if refused := _refusal(said):
                raise not_let_in(bootstrap, refused) from None
            reason = error.args[0].str()
        else:
            return
    raise no_answer(bootstrap, reason)


def no_answer(bootstrap: str, reason: str) -> BrokerUnavailableError:
    """The error that no broker answers, for the reason given."""
    return BrokerUnavailableError(
        problem=f"no Kafka broker answers at {bootstrap} ({reason})",
        fix="Check --bootstrap-servers, and --security-protocol where it wants TLS or a password; or leave them out for an embedded "
        "broker",
    )


def error_of(kind: type[_E], problem: str, cause: KafkaError, fix: str = "") -> _E | NotAllowedError:
    """The error of our own tree that a Kafka error amounts to: of a kind, or that a right is missing, for which there is one fix."""
    problem = problem.rstrip(".")  # as some of the client's texts end
    return NotAllowedError(problem, RIGHTS) if cause.code() in _RIGHTS_MISSING else kind(problem, fix)


def not_let_in(bootstrap: str, refusal: KafkaError) -> BrokerUnavailableError:
    """The error that a broker is there, and does not let this client in."""
    reason = refusal.str().split(": ", 1)[-1].rsplit(" (after ", 1)[0]  # without which connection it was, and how long
    login = refusal.code() == KafkaError._AUTHENTICATION
    return BrokerUnavailableError(
        problem=f"the Kafka broker at {bootstrap} does not let this client in ({reason})",
        fix="Check --sasl-mechanism, --sasl-username and --sasl-password"
        if login
        else "Check --security-protocol, --ssl-ca, and --ssl-certificate with --ssl-key where it wants one of each client",
    )


def _refusal(said: list[KafkaError]) -> KafkaError | None:
    """The newest of a client's errors that tells why it is not let in."""
    telling = (KafkaError._AUTHENTICATION, KafkaError._SSL)
    return next((error for error in reversed(said) if error.code() in telling or _TLS in error.str()), None)


def _refused_here(bootstrap: str) -> bool:
    """Whether all brokers are of this machine's loopback address, and refuse a connection."""
    for place in bootstrap.split(","):
        host, _, port = place.strip().rpartition(":")
        if host not in _LOOPBACK or not port.isdigit():
            return False
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except ConnectionRefusedError:
            continue
        except OSError:
            return False  # not clear: Kafka's client has the time to find out
        return False
    return True
