"""Ratings that come over HTTP, on their way to Kafka."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ray_pipeline.errors import RayPipelineError
from ray_pipeline.events import EventBatch
from ray_pipeline.serving.predictions import QueueFull

__all__ = ["OutsideQueue", "RatingDelivery"]

_log = logging.getLogger(__name__)

_WAITING_MOST = 20_000
_TOGETHER = 5_000
_TRY_FOR_S = 60.0
_BACKOFF_S = 1.0


class RatingDelivery(Protocol):
    """Where ratings go; see :class:`~ray_pipeline.delivery.outside.OutsideDelivery`."""

    def deliver(self, batch: EventBatch) -> None:
        """Write some ratings."""
        ...

    def close(self) -> None:
        """Let go of the broker; what is delivered afterwards takes hold of it again."""
        ...


class OutsideQueue:
    """Takes ratings without waiting and delivers them on a thread of its own; bounded.

    What the broker has not taken within a minute is dropped, counted in :attr:`lost`, and logged.

    Args:
        open_delivery: makes the delivery, when it is first needed.
    """

    def __init__(self, open_delivery: Callable[[], RatingDelivery]) -> None:
        self.lost = 0
        self.delivered = 0
        self._open_delivery = open_delivery
        self._delivery: RatingDelivery | None = None
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._in_hand = 0
        self._changed = threading.Condition()
        self._end = False
        self._thread: threading.Thread | None = None

    def put(self, ratings: Sequence[Mapping[str, Any]]) -> None:
        """Queue all of them, or none.

        Args:
            ratings: each with its four fields, checked.

        Raises:
            QueueFull: there is no room.
        """
        with self._changed:
            waiting = len(self._waiting) + self._in_hand
            if waiting + len(ratings) > _WAITING_MOST:
                raise QueueFull(f"{waiting:,} ratings wait for the broker, {_WAITING_MOST:,} at most: try again")
            self._waiting.extend(ratings)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="outside-ratings", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def waiting(self) -> int:
        """How many the broker has not taken yet."""
        with self._changed:
            return len(self._waiting) + self._in_hand

    def close(self, deadline_s: float = 10.0) -> None:
        """Wait for what is queued, at most ``deadline_s`` seconds, and end."""
        with self._changed:
            self._end = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(deadline_s)
            left = self.waiting()
            if left:
                _log.warning("%d ratings from outside were not delivered within %.0f s", left, deadline_s)

    # -- the thread

    def _run(self) -> None:
        while (ratings := self._next()) is not None:
            done = self._deliver(ratings)
            with self._changed:
                self._in_hand = 0
                self.delivered += done
                self.lost += len(ratings) - done
        self._let_go()

    def _next(self) -> list[Mapping[str, Any]] | None:
        with self._changed:
            while not self._waiting:
                if self._end:
                    return None
                self._changed.wait()
            found = [self._waiting.popleft() for _ in range(min(_TOGETHER, len(self._waiting)))]
            self._in_hand = len(found)
            return found

    def _deliver(self, ratings: Sequence[Mapping[str, Any]]) -> int:
        """How many of them were delivered: all, or none."""
        deadline = time.monotonic() + _TRY_FOR_S
        while True:
            try:
                self._try(ratings)
            except Exception as error:  # noqa: BLE001 - whatever it is: without this thread all would wait for ever
                _log.warning("%s", error, exc_info=not isinstance(error, RayPipelineError))
                self._let_go()
                if self._end or time.monotonic() > deadline:
                    _log.warning("%d ratings from outside are dropped", len(ratings))
                    return 0
                with self._changed:
                    self._changed.wait_for(lambda: self._end, _BACKOFF_S)
            else:
                return len(ratings)

    def _try(self, ratings: Sequence[Mapping[str, Any]]) -> None:
        # one for good: it knows what is to be made of a commit that nobody has answered to
        self._delivery = self._delivery or self._open_delivery()
        self._delivery.deliver(_columns(ratings))

    def _let_go(self) -> None:
        with contextlib.suppress(Exception):  # it has failed already, or nothing comes after it
            if self._delivery is not None:
                self._delivery.close()


def _columns(ratings: Sequence[Mapping[str, Any]]) -> EventBatch:
    def column(name: str) -> Any:
        return np.array([rating[name] for rating in ratings], np.int64)

    halves = np.array([round(rating["rating"] * 2) for rating in ratings], np.uint8)
    return EventBatch(0, 0, column("userId"), column("movieId"), halves, column("timestamp"))
