"""The shards of a running generator, lent to a Spark job: asked for over the control topic, kept for as long as is said, given back.

The generator takes them back when it hears nothing for some seconds: opening a shard shuts out whoever has it, so neither side can
lose or repeat a rating, whoever dies.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import BrokerUnavailableError, ConfigurationError, StageFailedError
from ray_pipeline.kafka.control import send_command
from ray_pipeline.kafka.read import newest_of_key, read_compacted

__all__ = ["LentShard", "Loan"]

_log = logging.getLogger(__name__)

_ANSWER_S = 30.0
_KEEP_EVERY_S = 2.0


class LentShard:
    """One shard as it was lent.

    Attributes:
        progress: where it is, with the plan that it follows.
        end: index after the last rating that is to be sent.
    """

    def __init__(self, progress: ShardProgress, end: int) -> None:
        self.progress = progress
        self.end = end


class Loan:
    """All shards, while this context is open: ``shards``, and ``settings`` with the generator's event settings.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        events: how many ratings are to be sent in place of the actors.
        reached: is called now and then with the number that is sent.

    Raises:
        ConfigurationError: the generator refuses, and says why.
        StageFailedError: no generator answers.
    """

    def __init__(self, settings: Settings, bootstrap: str, events: int, reached: Callable[[int], None]) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._events = events
        self._reached = reached
        self._end = threading.Event()
        self._identity = ""
        self.settings = settings
        self.shards: list[LentShard] = []
        self._thread = threading.Thread(target=self._keep, name="loan", daemon=True)

    def __enter__(self) -> Loan:
        """Ask for them, and wait until the actors have let go."""
        topic = self._settings.control_topic
        self._identity = send_command(self._bootstrap, topic, "lend", events=self._events)
        lent = self._answer()
        # a Spark job that was started apart knows nothing of seed and users
        self.settings = self._settings.with_events(lent["settings"])
        for record in lent["shards"]:
            end = int(record.pop("end"))
            self.shards.append(LentShard(ShardProgress.from_record(record), end))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        self._end.set()
        self._thread.join(30)
        send_command(self._bootstrap, self._settings.control_topic, "return", loan=self._identity)

    def _answer(self) -> dict[str, Any]:
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            value = newest_of_key(self._bootstrap, self._settings.progress_topic, "generator", 15.0, committed=False)
            said = json.loads(value) if value else {}
            refusal = said.get("answers", {}).get(self._identity)
            if refusal:
                raise ConfigurationError(problem=refusal)
            lent: dict[str, Any] | None = said.get("lent")
            if lent is not None and lent["id"] == self._identity:
                return lent
            time.sleep(0.2)
        raise StageFailedError(
            problem=f"no generator has lent its shards within {_ANSWER_S:.0f} s",
            fix="Check that one runs on these brokers",
        )

    def _keep(self) -> None:
        while not self._end.wait(_KEEP_EVERY_S):
            try:
                send_command(self._bootstrap, self._settings.control_topic, "keep", loan=self._identity)
                self._reached(self._sent())
            except (
                BrokerUnavailableError
            ) as error:  # when it lasts, the tasks fail, or the generator takes its shards back
                _log.warning("loan of the shards: %s", error)

    def _sent(self) -> int:
        records = read_compacted(self._bootstrap, self._settings.progress_topic)
        now = {p: int(records.get(f"shard/{p}", {}).get("next_index", 0)) for p in range(len(self.shards))}
        return sum(now[s.progress.partition] - s.progress.next_index for s in self.shards)
