"""A pipeline of the storm's own: ``ray-pipeline run`` as a child, on a state directory of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from ray_pipeline.config import ENVIRONMENT_PREFIX, Settings, flags_of, settings_of
from ray_pipeline.errors import StageFailedError
from ray_pipeline.fitted import REPLACED_FIELDS
from ray_pipeline.state import RunInfo, active_run

__all__ = ["ChildRun"]

_UP_S = 240.0
_END_S = 240.0
_SETTINGS: dict[str, Any] = {
    "api_port": 0,
    "ui_port": 0,
    # short windows, so that many close during the storm; a watermark beyond the longest outage, so that none drops ratings
    "tumbling_s": 10,
    "sliding_s": 30,
    "slide_s": 10,
    "watermark_s": 300,
}


class ChildRun:
    """Starts it, and ends it in order, or not.

    Args:
        settings: those that somebody has set are the pipeline's too, but for what the storm says itself.
        state_dir: a folder that no pipeline uses.
        rate: ratings per second.
        seed: of the events.

    Raises:
        ConfigurationError: the settings do not go with what the storm says.
    """

    def __init__(self, settings: Settings, state_dir: Path, rate: float, seed: int) -> None:
        told = {**_set_in(settings), "state_dir": state_dir, "rate": rate, "seed": seed, **_SETTINGS}
        self.settings = settings_of(told)
        self.output = state_dir / "chaos-run.log"
        self.command = [sys.executable, "-m", "ray_pipeline", "run", *flags_of(told)]
        self._state_dir = state_dir
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def conditions(self) -> str:
        """What the storm has made of the pipeline, for people."""
        told, usual_s = self.settings, Settings.model_fields["watermark_s"].default
        return (
            f"The storm started the pipeline itself: {told.partitions} partitions, {'`--fast`' if told.fast else 'plain'} delivery, "
            f"windows of {told.tumbling_s} s and {told.sliding_s} s. Their watermark of {told.watermark_s:g} s ({usual_s:g} s by "
            "default) is longer than any outage, so that none has ratings dropped as late."
        )

    def start(self) -> RunInfo:
        """Start it and wait until it is up.

        Raises:
            StageFailedError: it ended, or was not up within four minutes.
        """
        process = self._launch()
        deadline = time.monotonic() + _UP_S
        while (run := active_run(self._state_dir, "generate")) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise StageFailedError(problem=f"the pipeline did not start: {self._last_lines()}", fix="")
            time.sleep(0.2)
        return run

    def kill(self) -> None:
        """SIGKILL it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def wait_for_failure(self, deadline_s: float) -> None:
        """Wait until it has ended by itself.

        Raises:
            StageFailedError: not within ``deadline_s`` seconds, or as if all were well.
        """
        assert self._process is not None
        try:
            code = self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise StageFailedError(problem=f"the run has not ended within {deadline_s:.0f} s", fix="") from None
        if code == 0:
            raise StageFailedError(problem="the run ended with code 0", fix="")

    def start_again(self) -> tuple[int, float]:
        """Start it on its state directory once more; does not wait until it is up.

        Returns:
            The new process: its id, and when it started, seconds since the epoch.
        """
        process = self._launch()
        return process.pid, psutil.Process(process.pid).create_time()

    def end(self) -> None:
        """End it in order; by force when it does not.

        Raises:
            StageFailedError: it did not end in order.
        """
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code != 0:
            raise StageFailedError(problem=f"the pipeline ended with code {code}: {self._last_lines()}", fix="")

    def _launch(self) -> subprocess.Popen[bytes]:
        # its command says all of its settings
        environment = {
            k: v for k, v in os.environ.items() if k != "RAY_ADDRESS" and not k.upper().startswith(ENVIRONMENT_PREFIX)
        }
        with self.output.open("ab") as file:
            self._process = subprocess.Popen(
                self.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the storm, which ends it in order
            )
        return self._process

    def _last_lines(self) -> str:
        return " / ".join(self.output.read_text(errors="replace").splitlines()[-5:])


def _set_in(settings: Settings) -> dict[str, Any]:
    """What somebody has set, wherever; without what brings settings that are there one by one, and without a secret."""
    brought = REPLACED_FIELDS if settings.model is not None else ()
    told = settings.model_fields_set - {"preset", "control_token", *brought}
    values = {name: getattr(settings, name) for name in Settings.model_fields if name in told}
    return {name: value for name, value in values.items() if value is not None}
