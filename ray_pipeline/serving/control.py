"""Commands to the generator, and whether it obeyed."""

from __future__ import annotations

import threading

from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.kafka.control import send_command
from ray_pipeline.metrics.store import MetricsStore

__all__ = ["Control"]

_APPLIED_WITHIN_S = 2.0


class Control:
    """Sends a command and looks in the store for the generator's answer.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        store: has the generator's record.
        clock: tells the time.
    """

    def __init__(self, settings: Settings, bootstrap: str, store: MetricsStore, clock: Clock) -> None:
        self._topic = settings.control_topic
        self._bootstrap = bootstrap
        self._store = store
        self._clock = clock

    def send(
        self, command: str, rate: float | None = None, actors: int | None = None, plan: str | None = None
    ) -> tuple[str, bool]:
        """Send a command.

        Args:
            command: ``rate``, ``plan``, ``pause``, ``resume`` or ``scale``.
            rate: ratings per second, for ``rate``.
            actors: how many, for ``scale``.
            plan: text of the rate plan, for ``plan``.

        Returns:
            The command's id, and whether the generator has obeyed it within two seconds.

        Raises:
            BrokerUnavailableError: it could not be sent.
            ConfigurationError: the generator refused it.
        """
        identity = send_command(self._bootstrap, self._topic, command, rate, actors=actors, plan=plan)
        deadline_ms = self._clock.now_ms() + int(_APPLIED_WITHIN_S * 1000)
        never = threading.Event()
        while self._clock.now_ms() < deadline_ms:
            refusal = self._store.generator(self._clock.now_ms()).get("answers", {}).get(identity)
            if refusal:
                raise ConfigurationError(problem=refusal)
            if refusal is not None:
                return identity, True
            self._clock.wait(never, 0.05)
        return identity, False
