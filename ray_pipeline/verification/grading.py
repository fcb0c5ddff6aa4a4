"""Grades a topic of another system against the answer key. Needs the brokers alone."""

from __future__ import annotations

from typing import Any

from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError, UncheckedError
from ray_pipeline.kafka.read import read_compacted, read_topic
from ray_pipeline.truth.grade import ROLES, Grade, grade_deduplicated, grade_flagged, once_a_place
from ray_pipeline.verification.answers import reached_key
from ray_pipeline.verification.audit import published_run

__all__ = ["grade"]

_KINDS = {
    "deduplicated": (),
    "rejected": ("malformed", "missing_field", "out_of_range", "tombstone", "future"),
    "late": ("late", "out_of_order"),
    "attacked": (),
}


def grade(
    settings: Settings, bootstrap: str, topic: str, role: str, kind: str = "", lateness_ms: int = 0
) -> dict[str, Any]:
    """Grade a topic.

    Args:
        settings: names the topics and the catalogue.
        bootstrap: brokers, HOST:PORT[,…].
        topic: the topic to grade.
        role: what it holds, one of ``truth.grade.ROLES``.
        kind: grade on this kind of case alone; empty = all of the role.
        lateness_ms: as ``late`` count those at least so late.

    Raises:
        ConfigurationError: there is no such role, or it has no such kind.
        UncheckedError: there is no run, or the answer key does not reach all that was sent.
        BrokerUnavailableError: a topic cannot be read.
    """
    if role not in ROLES:
        raise ConfigurationError(problem=f"--as {role!r} is unknown", fix=f"Give one of: {', '.join(ROLES)}")
    if kind and kind not in _KINDS[role]:
        known = ", ".join(_KINDS[role]) or "none"
        raise ConfigurationError(problem=f"--kind {kind!r} does not go with --as {role}", fix=f"Its kinds are: {known}")
    cases = _cases(settings, bootstrap)
    records = read_topic(bootstrap, topic)
    if role == "deduplicated":
        ratings = ((r.partition, r.offset, r.value) for r in read_topic(bootstrap, settings.ratings_topic))
        found: Grade = grade_deduplicated(cases, ratings, (r.value for r in records))
    else:
        found = grade_flagged(role, cases, once_a_place((r.key, r.value) for r in records), kind, lateness_ms)
    return {"topic": topic, **found.as_dict()}


def _cases(settings: Settings, bootstrap: str) -> list[dict[str, Any]]:
    """The answer key, when it reaches all that the shards say they have sent."""
    run = published_run(settings, bootstrap)
    newest = read_compacted(bootstrap, settings.truth_topic)
    for partition, progress in sorted(run.progress.items()):
        reached = newest.get(reached_key(partition), {}).get("index", 0)
        if reached < progress.next_index:
            raise UncheckedError(
                problem=f"topic {settings.truth_topic} tells of {reached:,} of the {progress.next_index:,} records of partition "
                f"{partition}",
                fix="It is written by run and verify, where something is broken or changes: let one catch up, or stop sending",
            )
    return [case for case in newest.values() if "kind" in case]
