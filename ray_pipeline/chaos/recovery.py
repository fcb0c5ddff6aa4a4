"""When a pipeline has recovered: judged from what a reader of its topics sees. Pure: no Kafka, no clock.

A shard's ratings have the time at which they were due. So "back at the set rate" needs no averaging: a shard is back when a reader
sees ratings of it that were due after the fault, no later than a second after they were due, under the rate that is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Recovery", "Sample", "ShardSeen", "at_rate", "fresh"]

_LATE_MS = 1_000
_STALE_MS = 5_000
_SETTLED_MS = 1_500


@dataclass(frozen=True, slots=True)
class ShardSeen:
    """The newest committed progress of a shard.

    Attributes:
        event_ms: when its last rating was due, epoch milliseconds; 0 before the first.
        rate: rate of its plan, ratings per second over all shards.
        share: its share of all ratings.
    """

    event_ms: int
    rate: float
    share: float


@dataclass(frozen=True, slots=True)
class Sample:
    """What a reader sees at one moment.

    Attributes:
        at_ms: the moment, epoch milliseconds.
        shards: by partition.
        actors_down: generator actors that do not run.
        job_state: state of the Spark job.
        executors_missing: Spark executors below the wanted number.
        windowed_ms: newest event time that is in a published window, by partition.
        api_answers: whether the HTTP API answers.
    """

    at_ms: int
    shards: Mapping[int, ShardSeen]
    actors_down: int
    job_state: str
    executors_missing: int
    windowed_ms: Mapping[int, int]
    api_answers: bool


def _patience_ms(shard: ShardSeen) -> float:
    """A shard of few ratings is silent between two of them."""
    return 3_000.0 / max(shard.rate * shard.share, 1e-6)


def at_rate(sample: Sample, since_ms: int, rate: float) -> bool:
    """Whether all shards send at a rate, on time, ratings that were due after ``since_ms``."""
    return (
        bool(sample.shards)
        and sample.actors_down == 0
        and all(
            shard.rate == rate
            and shard.event_ms > since_ms
            and sample.at_ms - shard.event_ms <= _LATE_MS + _patience_ms(shard)
            for shard in sample.shards.values()
        )
    )


def fresh(sample: Sample, since_ms: int) -> bool:
    """Whether the windows hold ratings that were due after ``since_ms`` and within the last 5 seconds, of every shard."""
    return (
        bool(sample.shards)
        and sample.job_state == "running"
        and sample.executors_missing == 0
        and all(
            sample.windowed_ms.get(partition, 0) > since_ms
            and sample.at_ms - sample.windowed_ms[partition] <= _STALE_MS + _patience_ms(shard)
            for partition, shard in sample.shards.items()
        )
    )


@dataclass
class Recovery:
    """Follows the recovery from one fault.

    A time is that of the sample from which on the condition has held without a break.

    Attributes:
        since_ms: when the fault was over (a process killed or running again, a command sent), epoch milliseconds.
        rate: the rate that must be reached, ratings per second.
        at_rate_ms: when the generator was back at the rate; None so far.
        fresh_ms: when the windows were fresh again; None so far.
        api_ms: when the API answered again; None so far.
    """

    since_ms: int
    rate: float
    at_rate_ms: int | None = None
    fresh_ms: int | None = None
    api_ms: int | None = None
    _all_since_ms: int | None = field(default=None, repr=False)

    def observe(self, sample: Sample) -> bool:
        """Take a sample; whether all is well and has been for a moment."""
        self.at_rate_ms = _held(self.at_rate_ms, at_rate(sample, self.since_ms, self.rate), sample.at_ms)
        self.fresh_ms = _held(self.fresh_ms, fresh(sample, self.since_ms), sample.at_ms)
        self.api_ms = _held(self.api_ms, sample.api_answers, sample.at_ms)
        well = None not in (self.at_rate_ms, self.fresh_ms, self.api_ms)
        self._all_since_ms = _held(self._all_since_ms, well, sample.at_ms)
        return self._all_since_ms is not None and sample.at_ms - self._all_since_ms >= _SETTLED_MS

    def seconds(self, reached_ms: int | None) -> float | None:
        """How long something took, seconds; None when it was not reached."""
        return None if reached_ms is None else max(0, reached_ms - self.since_ms) / 1000.0

    def wanting(self) -> str:
        """What has not recovered, for people."""
        parts = {
            "the generator is not at the set rate": self.at_rate_ms,
            "the windows are not fresh": self.fresh_ms,
            "the API does not answer": self.api_ms,
        }
        return ", ".join(text for text, reached in parts.items() if reached is None) or "it does not stay well"


def _held(since_ms: int | None, holds: bool, now_ms: int) -> int | None:
    if not holds:
        return None
    return now_ms if since_ms is None else since_ms
