"""What it means to deliver a shard: ratings and progress, visible together."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, Protocol

from ray_pipeline.clock import LAST_MS
from ray_pipeline.codec import number_in, parse_json, text_in, whole_in
from ray_pipeline.errors import RecordError
from ray_pipeline.events import EventBatch

__all__ = ["Epoch", "ShardDelivery", "ShardProgress", "progress_key"]

_MOST_RATE = 1e12


@dataclass(frozen=True, slots=True)
class Epoch:
    """A stretch of the rate plan: a constant rate, or the text of a plan.

    Attributes:
        from_ms: event time from which it holds, epoch milliseconds UTC.
        rate: ratings per second over all shards, ≥ 0; 0 = paused, or a plan says it.
        plan: what the rate is, in the language of plans; None = constant.
        zero_ms: when that plan began, epoch milliseconds UTC: a pause or another start does not move it.
    """

    from_ms: int
    rate: float
    plan: str | None = None
    zero_ms: int = 0

    def same_rates(self, other: Epoch) -> bool:
        """Whether both say the same at any time."""
        return (self.rate, self.plan, self.zero_ms) == (other.rate, other.plan, other.zero_ms)

    def to_record(self) -> dict[str, Any]:
        """Ready for JSON."""
        if self.plan is None:
            return {"from_ms": self.from_ms, "rate": self.rate}
        return {"from_ms": self.from_ms, "plan": self.plan, "zero_ms": self.zero_ms}

    @classmethod
    def from_record(cls, record: Any) -> Epoch:
        """Read from JSON already.

        Raises:
            ValueError: it is no epoch.
        """
        if not isinstance(record, dict):
            msg = f"an epoch is {str(record)[:80]}"
            raise ValueError(msg)
        from_ms = whole_in(record, "from_ms", LAST_MS)
        if "plan" in record:
            return cls(from_ms, 0.0, text_in(record, "plan"), whole_in(record, "zero_ms", LAST_MS))
        return cls(from_ms, number_in(record, "rate", _MOST_RATE))


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """How far a shard is: a record of topic ``ratings.progress``.

    Attributes:
        run: id of the run.
        config: digest of the event settings and catalogue.
        partition: the shard.
        next_index: index of the next rating.
        event_time_ms: when the last rating was due, event time; None before the first.
        committed_ms: wall-clock time of the commit, epoch milliseconds.
        epochs: the rate plan as this shard lived it.
        share: the shard's share of all ratings.
        phase: the shard's phase in the plan.
        poisson_seed: seed of the arrivals' randomness; None = they are regular.
    """

    run: str
    config: str
    partition: int
    next_index: int
    event_time_ms: int | None
    committed_ms: int
    epochs: tuple[Epoch, ...]
    share: float
    phase: float
    poisson_seed: int | None = None

    def to_json(self) -> bytes:
        """The record's value."""
        fields: dict[str, Any] = {
            "run": self.run,
            "config": self.config,
            "partition": self.partition,
            "next_index": self.next_index,
            "event_time_ms": self.event_time_ms,
            "committed_ms": self.committed_ms,
            "epochs": [epoch.to_record() for epoch in self.epochs],
            "share": self.share,
            "phase": self.phase,
        }
        if self.poisson_seed is not None:
            fields["poisson_seed"] = self.poisson_seed
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, value: bytes) -> ShardProgress:
        """Read a record's value.

        Raises:
            RecordError: it is no progress record.
        """
        try:
            record = parse_json(value)
        except ValueError:
            record = value.decode(errors="replace")
        return cls.from_record(record)

    @classmethod
    def from_record(cls, record: Any) -> ShardProgress:
        """Take a record's value, read from JSON already.

        Raises:
            RecordError: it is no progress record.
        """
        try:
            return cls._read(record)
        except ValueError as error:
            raise RecordError(
                problem=f"not the progress record of a shard ({error}): {str(record)[:200]}",
                fix="Write the last true one under its key shard/<p> of the progress topic again, or begin anew with other topics",
            ) from error

    @classmethod
    def _read(cls, record: Any) -> ShardProgress:
        if not isinstance(record, dict):
            msg = "it is no JSON object"
            raise ValueError(msg)
        if unknown := record.keys() - {field.name for field in fields(cls)}:
            msg = f"it has the field {min(unknown)[:80]}"
            raise ValueError(msg)
        epochs = record.get("epochs")
        if not isinstance(epochs, list):
            msg = "it has no epochs"
            raise ValueError(msg)
        return cls(
            run=text_in(record, "run"),
            config=text_in(record, "config"),
            partition=whole_in(record, "partition"),
            next_index=whole_in(record, "next_index"),
            event_time_ms=None if record.get("event_time_ms") is None else whole_in(record, "event_time_ms", LAST_MS),
            committed_ms=whole_in(record, "committed_ms", LAST_MS),
            epochs=tuple(Epoch.from_record(epoch) for epoch in epochs),
            share=number_in(record, "share", 1.0),
            phase=number_in(record, "phase", 1.0),
            poisson_seed=None if record.get("poisson_seed") is None else whole_in(record, "poisson_seed", 2**63 - 1),
        )


def progress_key(partition: int) -> str:
    """Key of a shard's record in topic ``ratings.progress``."""
    return f"shard/{partition}"


class ShardDelivery(Protocol):
    """Delivers the ratings of one shard. One owner, one thread. After any error: close it and open another.

    Invariant: what a reader of committed data sees of the shard is always a prefix of its ratings, and the progress record
    names that prefix's length.
    """

    def open(self, deadline_s: float) -> ShardProgress | None:
        """Shut out predecessors and read the last committed progress; None when there is none. Blocks.

        Raises:
            DeliveryError: the broker did not answer within ``deadline_s`` seconds.
        """
        ...

    def newest(self, count: int, deadline_s: float) -> list[bytes | None]:
        """Values of the newest committed records of the shard's partition, the last one first; fewer when there are fewer.

        None where a record has no value, and for a partition of which all records were deleted. Waits for transactions of others that
        are open in the partition: they hide what is committed behind their beginning.

        Raises:
            DeliveryError: the broker did not answer, or such a transaction did not end, within ``deadline_s`` seconds.
        """
        ...

    def oldest(self, count: int, deadline_s: float) -> list[bytes | None]:
        """Values of the first committed records of the shard's partition, in their order; fewer when there are fewer.

        Raises:
            DeliveryError: the broker did not answer within ``deadline_s`` seconds.
        """
        ...

    def send(self, batch: EventBatch) -> None:
        """Queue ratings. Blocks while the queue is full: that is how an overloaded broker slows the sender down.

        Raises:
            DeliveryError: the queue stayed full, or sending failed for good.
            FencedError: a successor took over.
        """
        ...

    def commit(self, progress: ShardProgress) -> None:
        """Make all that was sent since the last commit visible, together with ``progress``. Blocks.

        Raises:
            DeliveryError: nothing of it is visible, or it is unknown whether it is; open again to learn it.
            FencedError: a successor took over.
        """
        ...

    def confirm(self, progress: ShardProgress, deadline_s: float) -> None:
        """Wait until readers of committed data see ``progress``, which was committed last. Blocks.

        A single broker that is killed when it has answered a commit may take it back.

        Raises:
            DeliveryError: they do not see it within ``deadline_s`` seconds.
        """
        ...

    def close(self) -> None:
        """Drop what was not committed and let go of the broker; may be called twice."""
        ...
