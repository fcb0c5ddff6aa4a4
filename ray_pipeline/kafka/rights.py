"""What a user may do at brokers that ask who it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation  # type: ignore[attr-defined]

from ray_pipeline.kafka.client import GROUP, make_admin, no_answer

__all__ = ["missing_rights"]

_ON_A_TOPIC = (AclOperation.DESCRIBE, AclOperation.READ, AclOperation.WRITE)
_ON_THE_GROUP = (AclOperation.DESCRIBE,)
_TIMEOUT_S = 15.0


def missing_rights(bootstrap: str, topics: Iterable[str]) -> tuple[list[str], list[str]]:
    """Ask the broker which of the operations that docs/brokers.md lists this user may not do.

    Topics that are not there, and transactional ids, it cannot be asked about.

    Args:
        bootstrap: brokers, HOST:PORT[,…].
        topics: names.

    Returns:
        The topics that are there, or that this user may not even see, and a line for each of those, and for the group, that lacks
        rights, such as ``"Read, Write on topic ratings"``.

    Raises:
        BrokerUnavailableError: no broker answers.
    """
    admin = make_admin(bootstrap)  # its futures live as long as it does
    asked = {"include_authorized_operations": True, "request_timeout": _TIMEOUT_S}
    try:
        on_topics = _allowed(admin.describe_topics(TopicCollection(list(topics)), **asked))
        on_group = _allowed(admin.describe_consumer_groups([GROUP], **asked))
    except KafkaException as error:
        raise no_answer(bootstrap, error.args[0].str()) from None
    lacking = [
        *_lacking("topic", on_topics, _ON_A_TOPIC),
        *_lacking("group", on_group, _ON_THE_GROUP),
    ]
    return list(on_topics), lacking


def _allowed(answers: Mapping[str, Future[Any]]) -> dict[str, set[AclOperation] | None]:
    """What may be done with each that is there; None where the broker does not say."""
    found: dict[str, set[AclOperation] | None] = {}
    for name, answer in answers.items():
        try:
            operations = answer.result(_TIMEOUT_S).authorized_operations
        except KafkaException as error:
            code = error.args[0].code()
            if code in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED):
                found[name] = set()
            elif code != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise
        else:
            found[name] = None if operations is None else set(operations)
    return found


def _lacking(
    kind: str, allowed: Mapping[str, set[AclOperation] | None], wanted: tuple[AclOperation, ...]
) -> Iterable[str]:
    for name, operations in allowed.items():
        missing = [] if operations is None else [op.name.capitalize() for op in wanted if op not in operations]
        if missing:
            yield f"{', '.join(missing)} on {kind} {name}"
