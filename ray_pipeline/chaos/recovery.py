"""When a pipeline has recovered: judged from what a reader of its topics sees. Pure: no Kafka, no clock.

A shard's ratings have the time at which they were due. So "back at the set rate" needs no averaging: a shard is back when a reader
sees ratings of it that were due after the fault, no later than a second after they were due, under the rate that is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Mark", "Recovery", "Sample", "ShardSeen", "at_rate", "fresh", "verifying"]

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
        job_batch: the newest micro-batch that the job has published.
        oracle_batch: the newest micro-batch that the oracle has compared; None where this pipeline has no oracle.
        oracle_ms: when the oracle last said that it runs, epoch milliseconds; 0 while it does not.
    """

    at_ms: int
    shards: Mapping[int, ShardSeen]
    actors_down: int
    job_state: str
    executors_missing: int
    windowed_ms: Mapping[int, int]
    api_answers: bool
    job_batch: int = -1
    oracle_batch: int | None = None
    oracle_ms: int = 0


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


def verifying(sample: Sample, since_ms: int, batch: int) -> bool:
    """Whether the oracle has said after ``since_ms`` that it has compared what the job had read up to a micro-batch."""
    return sample.oracle_batch is None or (sample.oracle_ms > since_ms and sample.oracle_batch >= batch)


@dataclass
class Mark:
    """When a condition came to hold for a moment without a break; what comes after that does not move it.

    Attributes:
        since_ms: since when it holds, or has held, epoch milliseconds; None while it does not.
        settled: whether it has held for a moment.
    """

    since_ms: int | None = None
    settled: bool = False

    def observe(self, holds: bool, now_ms: int) -> None:
        """Take a look."""
        if self.settled:
            return
        if not holds:
            self.since_ms = None
        elif self.since_ms is None:
            self.since_ms = now_ms
        else:
            self.settled = now_ms - self.since_ms >= _SETTLED_MS


@dataclass
class Recovery:
    """Follows the recovery from one fault.

    Attributes:
        since_ms: when the fault was over (a process killed or running again, a command sent), epoch milliseconds.
        rate: the rate that must be reached, ratings per second.
        at_rate: the generator was back at the rate.
        fresh: the windows were fresh again.
        api: the API answered again.
        oracle: the oracle had compared what the job had read by the first look.
        well: all of it at once.
    """

    since_ms: int
    rate: float
    at_rate: Mark = field(default_factory=Mark)
    fresh: Mark = field(default_factory=Mark)
    api: Mark = field(default_factory=Mark)
    oracle: Mark = field(default_factory=Mark)
    well: Mark = field(default_factory=Mark)
    _batch: int | None = field(default=None, init=False, repr=False)

    def observe(self, sample: Sample) -> bool:
        """Take a sample; whether all is well and has been for a moment."""
        now_ms, api = sample.at_ms, sample.api_answers
        rate, windows = at_rate(sample, self.since_ms, self.rate), fresh(sample, self.since_ms)
        self._batch = sample.job_batch if self._batch is None else self._batch
        oracle = verifying(sample, self.since_ms, self._batch)
        marks = ((self.at_rate, rate), (self.fresh, windows), (self.api, api), (self.oracle, oracle))
        for mark, holds in (*marks, (self.well, rate and windows and api and oracle)):
            mark.observe(holds, now_ms)
        return self.well.settled

    def seconds(self, mark: Mark) -> float | None:
        """How long something took, seconds; None when it was not reached."""
        return max(0, mark.since_ms - self.since_ms) / 1000.0 if mark.settled and mark.since_ms is not None else None

    def wanting(self) -> str:
        """What has not recovered, for people."""
        parts = {
            "the generator is not at the set rate": self.at_rate,
            "the windows are not fresh": self.fresh,
            "the API does not answer": self.api,
            "the oracle does not compare the windows": self.oracle,
        }
        return ", ".join(text for text, mark in parts.items() if not mark.settled) or "it does not stay well"
