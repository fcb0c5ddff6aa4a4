"""Keeps the embedded broker running: a broker that died is started again, on its port and data."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.errors import EnvironmentProblem, StageFailedError
from ray_pipeline.kafka.broker import FREE_SPACE, EmbeddedBroker
from ray_pipeline.restart import Decision, RestartPolicy

__all__ = ["BrokerSupervisor"]

_log = logging.getLogger(__name__)

_POLL_S = 0.2


class BrokerSupervisor:
    """Starts a broker and watches it, on one thread: the kernel ends the child when the thread that started it ends.

    Args:
        broker: what to keep running.
        on_event: is called with a line when something noteworthy happens.
        clock: tells the time.
        policy: decides whether to start again.
    """

    def __init__(
        self,
        broker: EmbeddedBroker,
        on_event: Callable[[str], None],
        clock: Clock | None = None,
        policy: RestartPolicy | None = None,
    ) -> None:
        self.broker = broker
        self.restarts = 0
        self._on_event = on_event
        self._clock = clock or SystemClock()
        self._policy = policy or RestartPolicy(most=10)
        self._error: Exception | None = None
        self._started: queue.Queue[Exception | None] = queue.Queue(1)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="broker", daemon=True)

    def start(self, deadline_s: float = 60.0) -> None:
        """Start the broker and wait until it answers.

        Raises:
            EnvironmentProblem: it does not start.
        """
        self._thread.start()
        error = self._started.get(timeout=deadline_s + 10)
        if error is not None:
            raise error

    def check(self) -> None:
        """Raise what made the broker fail for good, if anything did."""
        if self._error is not None:
            raise self._error

    def stop(self, deadline_s: float = 30.0) -> None:
        """End the broker in order."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(deadline_s)
        self.broker.stop(1.0)

    def _watch(self) -> None:
        try:
            self.broker.start()
        except Exception as error:  # noqa: BLE001 - handed to start(), which raises it
            self._started.put(error)
            return
        self._started.put(None)
        while not self._clock.wait(self._end, _POLL_S):
            if self.broker.pid is None and not self._restart():
                return
        self.broker.stop()

    def _restart(self) -> bool:
        if full := self.broker.full_disk():  # it would die again, until somebody frees space
            return self._give_up(StageFailedError(problem=f"the broker died: {full}", fix=FREE_SPACE))
        if self._policy.failed(self._clock.now_ms()) is Decision.GIVE_UP:
            return self._give_up(
                StageFailedError(
                    problem="the broker died too often and is given up", fix=f"See {self.broker.log_file.name}"
                )
            )
        self._on_event("the broker died and is started again")
        self.broker.kill()  # lets go of the lock
        self._clock.wait(self._end, self._policy.backoff_s)
        try:
            self.broker.start()
        except EnvironmentProblem as error:
            _log.warning("the broker did not start: %s", error)
            return True
        self.restarts += 1
        self._on_event(f"the broker is back (restart {self.restarts})")
        return True

    def _give_up(self, error: StageFailedError) -> bool:
        self._error = error
        self._on_event(error.problem)
        return False
