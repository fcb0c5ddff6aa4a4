"""How ratings get into the queue of a producer, record by record."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.delivery.sending import RecordSender
from ray_pipeline.events import EventBatch

DEADLINE_S = 20


class Queue:
    """A producer whose queue is full while ``room`` is not set."""

    def __init__(self) -> None:
        self.room, self.full = threading.Event(), threading.Event()
        self.queued: list[tuple[Any, ...]] = []

    def produce(self, *record: Any) -> None:
        if len(self.queued) == 3 and not self.room.is_set():
            self.full.set()
            raise BufferError
        self.queued.append(record)

    def poll(self, timeout_s: float) -> int:
        self.room.wait(timeout_s)
        return 0


def batch(partition: int) -> EventBatch:
    ids = np.arange(1, 8)
    return EventBatch(partition, 0, ids, ids + 100, ids.astype(np.uint8), ids + 1_700_000_000_000)


def records(events: EventBatch) -> list[tuple[Any, ...]]:
    rows = zip(encode_values(events), encode_keys(events), strict=True)
    return [("ratings", value, key, events.partition) for value, key in rows]


def test_a_shard_whose_queue_is_full_holds_no_other_up_and_goes_on_where_it_was() -> None:
    slow, fast = Queue(), Queue()
    fast.room.set()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(RecordSender(slow, "ratings").send, batch(0))  # type: ignore[arg-type]
        try:
            assert slow.full.wait(DEADLINE_S)
            pool.submit(RecordSender(fast, "ratings").send, batch(1)).result(DEADLINE_S)  # type: ignore[arg-type]
            assert not waiting.done()
        finally:
            slow.room.set()
        waiting.result(DEADLINE_S)
    assert slow.queued == records(batch(0))
    assert fast.queued == records(batch(1))
