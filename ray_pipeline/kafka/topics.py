"""The topics: made when missing, checked when there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]

from ray_pipeline.config import Settings
from ray_pipeline.errors import BrokerUnavailableError, StateMismatchError
from ray_pipeline.kafka.client import error_of, make_admin, no_answer

__all__ = ["TopicSpec", "delete_topics", "ensure_topics", "partitions_of", "topic_specs"]

_TIMEOUT_S = 15.0
_LOOK_AGAIN_S = 0.05
_COMPACT = {
    "cleanup.policy": "compact",
    # small segments are compacted soon: a reader from the start then reads little
    "segment.ms": "60000",
    "segment.bytes": "16777216",
    "min.cleanable.dirty.ratio": "0.1",
}
_KEEP = {"cleanup.policy": "delete", "retention.ms": "-1"}
_KEEP_A_WEEK = {"cleanup.policy": "delete", "retention.ms": "604800000"}


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as it must be."""

    name: str
    partitions: int
    config: dict[str, str] = field(default_factory=dict)


def topic_specs(settings: Settings) -> list[TopicSpec]:
    """Every topic of the pipeline."""
    return [
        TopicSpec(settings.ratings_topic, settings.partitions, _KEEP),
        TopicSpec(settings.progress_topic, 1, _COMPACT),
        TopicSpec(settings.control_topic, 1, _KEEP_A_WEEK),
        TopicSpec(settings.rejected_topic, 1, _COMPACT),
        TopicSpec(settings.outside_topic, 1, _KEEP),
        TopicSpec(settings.metrics_topic, 1, _COMPACT),
        TopicSpec(settings.job_topic, 1, _COMPACT),
        TopicSpec(settings.batches_topic, 1, _KEEP),
        TopicSpec(settings.expected_topic, 1, _COMPACT),
        TopicSpec(settings.truth_topic, 1, _COMPACT),
        TopicSpec(settings.predictions_topic, 1, _KEEP_A_WEEK),
        TopicSpec(settings.scores_topic, 1, _COMPACT),
    ]


def partitions_of(bootstrap: str, topics: list[str]) -> dict[str, int]:
    """Number of partitions of each topic that exists.

    Raises:
        BrokerUnavailableError: no broker answers.
    """
    try:
        metadata = make_admin(bootstrap).list_topics(timeout=_TIMEOUT_S).topics
    except KafkaException as error:
        raise no_answer(bootstrap, error.args[0].str()) from None
    return {name: len(metadata[name].partitions) for name in topics if name in metadata}


def ensure_topics(settings: Settings, bootstrap: str) -> None:
    """Make the topics that are missing.

    Raises:
        BrokerUnavailableError: no broker answers.
        StateMismatchError: the ratings topic has another number of partitions.
    """
    specs = topic_specs(settings)
    there = partitions_of(bootstrap, [spec.name for spec in specs])
    found = there.get(settings.ratings_topic, settings.partitions)
    if found != settings.partitions:
        raise StateMismatchError(
            problem=f"topic {settings.ratings_topic} has {found} partitions, the settings say {settings.partitions}",
            fix=f"Give --partitions {found}, another topic, or clear it with: ray-pipeline reset",
        )
    missing = [
        NewTopic(spec.name, spec.partitions, settings.replication_factor, config=spec.config)
        for spec in specs
        if spec.name not in there
    ]
    if not missing:
        return
    admin = make_admin(bootstrap)  # its futures live as long as it does
    for name, done in admin.create_topics(missing, operation_timeout=_TIMEOUT_S).items():
        try:
            done.result(_TIMEOUT_S)
        except KafkaException as error:
            cause: KafkaError = error.args[0]
            if cause.code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another stage may have made it meanwhile
                problem = f"topic {name} could not be made: {cause.str()}"
                fix = "Check --replication-factor and the broker's log"
                raise error_of(BrokerUnavailableError, problem, cause, fix) from error
    _wait_until_seen(bootstrap, [topic.topic for topic in missing])


def _wait_until_seen(bootstrap: str, topics: list[str]) -> None:
    """A broker answers for a topic a moment after it was made, also when another stage made it."""
    deadline = time.monotonic() + _TIMEOUT_S
    while unseen := set(topics).difference(partitions_of(bootstrap, topics)):
        if time.monotonic() > deadline:
            raise BrokerUnavailableError(
                problem=f"topic {min(unseen)} was made, and the broker does not know it after {_TIMEOUT_S:.0f} s",
                fix="Check the broker's log",
            )
        time.sleep(_LOOK_AGAIN_S)


def delete_topics(settings: Settings, bootstrap: str) -> list[str]:
    """Delete this pipeline's topics, and no other.

    Returns:
        The names of those that were there.
    """
    there = list(partitions_of(bootstrap, [spec.name for spec in topic_specs(settings)]))
    if there:
        admin = make_admin(bootstrap)
        for done in admin.delete_topics(there, operation_timeout=_TIMEOUT_S).values():
            done.result(_TIMEOUT_S)
    return there
