"""An actor that is started, watched, and started again when its process dies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.errors import CheckpointError, ConfigurationError, RayPipelineError, StageFailedError
from ray_pipeline.restart import Decision, RestartPolicy

__all__ = ["SupervisedActor"]

_log = logging.getLogger(__name__)

_POLL_S = 0.5
_SILENT_AFTER_MS = 120_000


class SupervisedActor:
    """Keeps one stage's actor running.

    The actor's class has ``start()``, which blocks until the stage works, and ``status() -> dict``, which returns at once
    and says ``{"state": "failed", "reason": …}`` when the stage ended by itself, ``{"state": "stuck", "reason": …}`` when only a fresh
    process can help, ``{"state": "starting"}`` before ``start()`` has been called, and whether ``"stop_asked"``. The actor must be
    made with ``max_restarts=-1``, so that Ray brings its process back; ``start()`` is then called again.

    Args:
        name: what to call the stage in messages.
        build: makes the actor and returns its handle.
        on_event: is called with a line when something noteworthy happens.
        clock: tells the time.
        policy: decides whether to go on after a failure.
        replacement: decides whether to replace a stage that is stuck once more.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], Any],
        on_event: Callable[[str], None],
        clock: Clock | None = None,
        policy: RestartPolicy | None = None,
        replacement: RestartPolicy | None = None,
    ) -> None:
        self.name = name
        self.restarts = 0
        self.stop_asked = False
        """Whether the actor was asked to have the pipeline stop."""
        self._build = build
        self._on_event = on_event
        self._clock = clock or SystemClock()
        self._policy = policy or RestartPolicy(most=10)
        self._replacement = replacement or RestartPolicy(most=5, span_ms=900_000)
        self._handle: Any = None
        self._starting: Any = None
        self._error: Exception | None = None
        self._status: dict[str, Any] = {"state": "starting"}
        self._heard_ms = 0
        self._up = threading.Event()
        self._end = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watch-{name}", daemon=True)

    @property
    def handle(self) -> Any:
        """The actor's handle."""
        return self._handle

    @property
    def status(self) -> dict[str, Any]:
        """What the stage last said of itself."""
        return self._status

    @property
    def up(self) -> bool:
        """Whether the stage is started and answers."""
        return self._up.is_set()

    def start(self) -> None:
        """Make the actor and have it start; does not wait."""
        self._handle = self._build()
        self._starting = self._handle.start.remote()
        self._heard_ms = self._clock.now_ms()
        self._thread.start()

    def wait_until_up(self, deadline_s: float) -> None:
        """Block until the stage works.

        Raises:
            StageFailedError: not within ``deadline_s`` seconds.
            RayPipelineError: what made the start fail.
        """
        deadline_ms = self._clock.now_ms() + int(deadline_s * 1000)
        while not self._up.is_set():
            self.check()
            if self._clock.now_ms() > deadline_ms:
                raise StageFailedError(
                    problem=f"{self.name} did not start within {deadline_s:.0f} s",
                    fix="See ray-pipeline doctor, and the logs in the state directory",
                )
            self._clock.wait(self._up, 0.1)

    def check(self) -> None:
        """Raise what made the stage fail for good, if anything did."""
        if self._error is not None:
            raise self._error

    def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method of the actor and wait for its result.

        Raises:
            StageFailedError: the actor is down, or does not answer in time.
            RayPipelineError: what the method raised.
        """
        try:
            return ray.get(getattr(self._handle, method).remote(*args), timeout=timeout_s)
        except (RayActorError, GetTimeoutError) as error:
            raise StageFailedError(
                problem=f"{self.name} does not answer ({type(error).__name__})", fix="Try again in a moment"
            ) from error
        except RayTaskError as error:
            raise _cause(self.name, error) from error

    def refresh(self) -> None:
        """Ask for the status now."""
        self._status = self.call("status", timeout_s=30.0)

    def stop_watching(self) -> None:
        """Take the actor's end as wanted from now on."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def kill(self) -> None:
        """End the actor's process at once."""
        self.stop_watching()
        if self._handle is not None:
            ray.kill(self._handle)

    # -- the watching thread

    def _watch(self) -> None:
        while not self._end.is_set() and self._error is None:
            try:
                if self._starting is not None:
                    self._finish_start()
                else:
                    self._poll()
            except ActorUnavailableError as error:
                if self._starting is None:
                    self._died(error)
                else:
                    self._ask_again(error)
            except RayActorError as error:
                self._died(error)
            self._clock.wait(self._end, _POLL_S)

    def _finish_start(self) -> None:
        ready, _ = ray.wait([self._starting], timeout=_POLL_S)
        if not ready:
            return
        try:
            ray.get(self._starting)
        except RayTaskError as error:
            if isinstance(error, RayActorError):
                raise
            self._start_failed(_cause(self.name, error))
            return
        self._starting = None
        self._heard_ms = self._clock.now_ms()
        self._status = ray.get(self._handle.status.remote(), timeout=30)
        self._up.set()
        if self.restarts:
            self._on_event(f"{self.name} is back (restart {self.restarts})")

    def _poll(self) -> None:
        try:
            self._status = ray.get(self._handle.status.remote(), timeout=10)
            self._heard_ms = self._clock.now_ms()
            self.stop_asked = self.stop_asked or bool(self._status.get("stop_asked"))
        except (GetTimeoutError, RayTaskError) as error:
            if isinstance(error, RayActorError):
                raise
            _log.warning("%s does not say how it is: %s", self.name, error)
            if self._clock.now_ms() - self._heard_ms > _SILENT_AFTER_MS:
                self._replace(f"it has not answered for {_SILENT_AFTER_MS // 1000} s")
            return
        reason = str(self._status.get("reason") or "no reason given")
        if self._status.get("state") == "failed":
            self._error = StageFailedError(problem=f"{self.name} failed: {reason}", fix="")
        elif self._status.get("state") == "stuck":
            self._replace(reason)
        elif self._status.get("state") == "starting":  # its process was replaced between two looks
            self._up.clear()
            self._again(f"{self.name} died; Ray starts it again")

    def _replace(self, reason: str) -> None:
        """End the process; Ray brings a fresh one, in which the stage is started again when its death is noticed."""
        if self._replacement.failed(self._clock.now_ms()) is Decision.GIVE_UP:
            self._error = StageFailedError(
                problem=f"{self.name}: {reason}; {self._replacement.most} fresh starts within "
                f"{self._replacement.span_ms // 60_000} min did not help",
                fix="See ray-pipeline doctor for CPUs and memory, and the logs in the state directory",
            )
            return
        self._on_event(f"{self.name}: {reason}; its process is replaced")
        self._heard_ms = self._clock.now_ms()
        self._up.clear()
        self._status = {"state": "restarting"}
        ray.kill(self._handle, no_restart=False)

    def _start_failed(self, error: RayPipelineError) -> None:
        self._starting = None
        # what never worked has its reason in the configuration: trying again is no help, nor is it with a broken file
        if self.restarts == 0 or isinstance(error, CheckpointError | ConfigurationError):
            self._error = error
            return
        self._again(f"{self.name} could not start again: {error}")

    def _ask_again(self, error: ActorUnavailableError) -> None:
        """The fresh process was not there yet when it was told to start."""
        _log.debug("%s: %s", self.name, error)
        if self._clock.now_ms() - self._heard_ms > _SILENT_AFTER_MS:
            self._error = StageFailedError(
                problem=f"{self.name} has not come back for {_SILENT_AFTER_MS // 1000} s",
                fix="See ray-pipeline doctor for CPUs and memory of the Ray cluster",
            )
            return
        self._starting = self._handle.start.remote()

    def _died(self, error: RayActorError) -> None:
        _log.debug("%s: %s", self.name, error)
        self._up.clear()
        self._again(f"{self.name} died; Ray starts it again")

    def _again(self, line: str) -> None:
        self._status = {"state": "restarting"}
        if self._policy.failed(self._clock.now_ms()) is Decision.GIVE_UP:
            self._error = StageFailedError(problem=f"{line}: too often, given up", fix="See the logs")
            return
        self.restarts += 1
        self._on_event(line)
        self._clock.wait(self._end, self._policy.backoff_s)
        self._starting = self._handle.start.remote()


def _cause(name: str, error: RayTaskError) -> RayPipelineError:
    cause = error.cause
    if isinstance(cause, RayPipelineError):
        return cause
    return StageFailedError(problem=f"{name}: {type(cause).__name__}: {cause}", fix="")
