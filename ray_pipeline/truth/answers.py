"""The answer key: what is wrong with a partition on purpose, and what changes in it: a record of topic ``ratings.truth`` a case.

Nothing in the stream tells these cases from honest records; this does, with index and offset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ray_pipeline.codec import encode_values
from ray_pipeline.events import EventBatch, Fault
from ray_pipeline.model.faults import Fates, Faults
from ray_pipeline.model.labels import attack_ratings
from ray_pipeline.truth.follower import Follower
from ray_pipeline.truth.replay import ShardReplay

__all__ = ["AnswerKey", "answer_key"]

_LOST_FROM = 1 << 40
"""Lost ratings are drawn where no shard comes to; who is there by then, and what has begun, goes by where they were lost."""
_TEXT_BROKEN = (Fault.MALFORMED, Fault.MISSING_FIELD, Fault.OUT_OF_RANGE)


def answer_key(record: dict[str, Any]) -> str:
    """Key of a record of topic ``ratings.truth``: ``<kind>/<partition>/<index>``, with the number of a drift or an attack behind it."""
    number = f"/{record['number']}" if "number" in record else ""
    return f"{record['kind']}/{record['partition']}/{record['index']}{number}"


class AnswerKey:
    """Goes along with a partition's records and says of each what is wrong with it on purpose.

    Args:
        replay: the shard.
        index: the first record that :meth:`take` will be given is this rating.
        labels: what changes in the course of the partition, as :func:`ray_pipeline.model.labels.labels` has it.
    """

    def __init__(self, replay: ShardReplay, index: int, labels: Sequence[dict[str, Any]] = ()) -> None:
        self._replay = replay
        self._labels = labels
        self._faults = replay.model.faults
        self._follower = Follower(replay, index)

    @property
    def index(self) -> int:
        """Which rating comes next."""
        assert self._follower.index is not None
        return self._follower.index

    def renew(self) -> None:
        """The shard's plan has changed: times of ratings to come are made anew."""
        self._follower.forget()

    def take(self, values: Sequence[bytes | None], offsets: Sequence[int]) -> list[dict[str, Any]]:
        """The cases among the next records; what is no rating of the shard, or one that was there before, is passed over.

        Args:
            values: their values; each must be one that the shard says it has sent.
            offsets: their offsets.
        """
        places: dict[int, int] = {}
        before = self.index
        for value, offset in zip(values, offsets, strict=True):
            index = self._follower.index_of(value)
            if index is not None and index >= before:
                places.setdefault(index, offset)
        found: list[dict[str, Any]] = []
        if places:
            first, last = min(places), max(places)
            for start in range(first, last + 1, 1 << 16):
                found += self._cases(start, min(1 << 16, last + 1 - start), places)
        return found

    # -- inside

    def _cases(self, first: int, count: int, places: dict[int, int]) -> Iterator[dict[str, Any]]:
        events, fates = self._replay.events(first, count), self._replay.fates(first, count)
        yield from self._of_attacks(events, places)
        yield from self._changes(first, count, places)
        if fates is None or self._faults is None:
            return
        texts = encode_values(events)
        for at in np.flatnonzero(fates.faults).tolist():
            offset = places.get(first + at)
            if offset is not None:
                yield self._record(events, fates, at, offset, texts[at])
        yield from self._lost(self._faults, first, count, fates, places)
        yield from self._of_the_shard(self._faults, first, fates, places)

    def _of_attacks(self, events: EventBatch, places: dict[int, int]) -> Iterator[dict[str, Any]]:
        for case in attack_ratings(self._replay.model, events.first_index, len(events)):
            offset = places.get(case["index"])
            if offset is not None:
                yield {**case, "offset": offset, "rating": _rating(events, case["index"] - events.first_index)}

    def _changes(self, first: int, count: int, places: dict[int, int]) -> Iterator[dict[str, Any]]:
        """Drifts and attacks that begin here; each stands where its first rating does, or the next one that is there."""
        for label in self._labels:
            if first <= label["index"] < first + count:
                behind = [index for index in places if index >= label["index"]]
                if behind:
                    yield {**label, "offset": places[min(behind)]}

    def _record(self, events: EventBatch, fates: Fates, at: int, offset: int, text: bytes | None) -> dict[str, Any]:
        fault, index = Fault(int(fates.faults[at])), fates.first + at
        assert self._replay.valid is not None
        case = {**self._head(fault.name.lower(), index, offset), "rating": _rating(events, at)}
        case["lateness_ms"] = int(fates.due_ms[at] - fates.times_ms[at])
        case["rejected"] = bool(self._replay.valid.rejects[fault])
        if fault is Fault.DUPLICATE:
            case["repeats"] = int(fates.sources[at])
        if fault in _TEXT_BROKEN and text is not None:
            case["value"] = text.decode()
        return case

    def _lost(
        self, faults: Faults, first: int, count: int, fates: Fates, places: dict[int, int]
    ) -> Iterator[dict[str, Any]]:
        for index in faults.dropped(first, count).tolist():
            offset = places.get(index)
            if offset is None:
                continue
            drawn = self._replay.model.draw(index, 1, _LOST_FROM)
            times_ms = fates.due_ms[index - first : index - first + 1] + faults.skew_ms
            lost = EventBatch(
                self._replay.partition, index, drawn.user_ids, drawn.movie_ids, drawn.half_stars, times_ms
            )
            yield {**self._head("dropped", index, offset), "rating": _rating(lost, 0)}

    def _of_the_shard(
        self, faults: Faults, first: int, fates: Fates, places: dict[int, int]
    ) -> Iterator[dict[str, Any]]:
        """Its clock, once; and each silence, at the first rating that was held back."""
        if first == 0 and faults.skew_ms and 0 in places:
            yield {**self._head("clock_skew", 0, places[0]), "shift_ms": faults.skew_ms}
        sent_ms = faults.sent_ms(fates.due_ms)
        held = sent_ms > fates.due_ms
        begins = held & (np.concatenate([self._sent_before(faults, first), sent_ms[:-1]]) != sent_ms)
        for at in np.flatnonzero(begins).tolist():
            offset, since_ms = places.get(first + at), faults.silent_since(int(fates.due_ms[at]))
            if offset is not None:
                yield {
                    **self._head("silent", first + at, offset),
                    "from_ms": since_ms,
                    "to_ms": int(sent_ms[at]),
                }

    def _sent_before(self, faults: Faults, first: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """When the rating before one was sent, shape (1,); -1 where there is none."""
        if not first:
            return np.array([-1], np.int64)
        return faults.sent_ms(np.array([self._replay.due_ms(first - 1)], np.int64))

    def _head(self, kind: str, index: int, offset: int) -> dict[str, Any]:
        return {"kind": kind, "partition": self._replay.partition, "index": index, "offset": offset}


def _rating(events: EventBatch, at: int) -> dict[str, Any]:
    return {
        "userId": int(events.user_ids[at]),
        "movieId": int(events.movie_ids[at]),
        "rating": int(events.half_stars[at]) / 2,
        "timestamp": int(events.timestamps_ms[at]),
    }
