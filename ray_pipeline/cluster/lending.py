"""The generator's side of a loan: all shards in the hands of somebody who sends history in place of the actors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import ConfigurationError, RayPipelineError
from ray_pipeline.generator.coordination import Coordinator
from ray_pipeline.generator.placement import Placement
from ray_pipeline.kafka.read import read_compacted

__all__ = ["Lending"]

_KEPT_MS = 15_000  # without a word from the borrower the actors go on
_READ_S = 20.0


class Lending:
    """Lends all shards to one borrower at a time, and takes them back when he is silent. One thread calls it.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        coordinator: makes room for history in the plan.
        placement: has the actors let go.
        lock: guards the coordinator.
        clock: tells the time.
        note: is called with a line when something noteworthy happens.
        answer: is called with a command's id and why it was refused; None = it was obeyed.
    """

    def __init__(
        self,
        settings: Settings,
        bootstrap: str,
        coordinator: Coordinator,
        placement: Placement,
        lock: threading.RLock,
        clock: Clock,
        note: Callable[[str], None],
        answer: Callable[[str, RayPipelineError | None], None],
    ) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._coordinator = coordinator
        self._placement = placement
        self._lock = lock
        self._clock = clock
        self._note = note
        self._answer = answer
        self._identity: str | None = None
        self._events = 0
        self._until_ms = 0
        self._record: dict[str, Any] | None = None

    @property
    def active(self) -> bool:
        """Whether shards are lent, or about to be."""
        return self._identity is not None

    @property
    def record(self) -> dict[str, Any] | None:
        """What was lent: id, ratings, event settings, and each shard's place, plan and end; None = nothing."""
        return self._record

    def begin(self, identity: str, events: int) -> None:
        """Have the actors let go; answered when they have.

        Raises:
            ConfigurationError: the number is none, or a loan is under way.
        """
        if isinstance(events, bool) or not isinstance(events, int) or events < 1:
            raise ConfigurationError(
                problem=f"{events!r} ratings of history cannot be made", fix="Give a number above 0"
            )
        if self.active:
            raise ConfigurationError(problem="not now: a backfill is under way", fix="Wait for its end")
        self._identity, self._events = identity, events
        self._placement.lend(self._clock.now_ms())
        self._note(f"backfill of {events:,} ratings: the actors let go of their shards")

    def keep(self, identity: str) -> None:
        """The borrower is still there."""
        if identity == self._identity:
            self._until_ms = self._clock.now_ms() + _KEPT_MS

    def end(self, identity: str) -> None:
        """The borrower gives back what he has."""
        if identity == self._identity:
            self.take_back("backfill ended: the actors go on")

    def take_back(self, line: str) -> None:
        """Give the actors their shards again, and say why."""
        self._identity = self._record = None
        self._placement.take_back()
        with self._lock:
            self._coordinator.give_back(self._clock.now_ms())
        self._note(line)

    def step(self) -> None:
        """Hand over when the actors have let go; take back when the borrower has said nothing for long."""
        if self._identity is None:
            return
        if self._record is None:
            if self._placement.lent:
                self._hand_over(self._identity)
        elif self._clock.now_ms() > self._until_ms:
            self.take_back(f"nobody has kept the backfill's loan for {_KEPT_MS // 1000} s: the actors go on")

    def _hand_over(self, identity: str) -> None:
        try:
            progress = self._progress()
            with self._lock:
                wanted = self._coordinator.lend(self._clock.now_ms(), self._events, progress)
        except RayPipelineError as error:
            self.take_back("the actors go on")
            self._answer(identity, error)
            return
        shards = []
        for p, told in sorted(wanted.items()):
            before = progress[p]
            first = before.next_index if before else 0
            place = ShardProgress(
                *(told.run, told.config, p, first, None, self._clock.now_ms(), told.epochs, told.share, told.phase),
                poisson_seed=told.poisson_seed,
            )
            shards.append({**json.loads(place.to_json()), "end": told.end_index})
        event_settings = self._settings.event_settings()
        self._record = {"id": identity, "events": self._events, "settings": event_settings, "shards": shards}
        self.keep(identity)
        self._answer(identity, None)

    def _progress(self) -> list[ShardProgress | None]:
        """Of each shard, as it is committed now that nobody sends."""
        records = read_compacted(self._bootstrap, self._settings.progress_topic, _READ_S)
        found = [records.get(f"shard/{p}") for p in range(self._settings.partitions)]
        return [None if record is None else ShardProgress.from_record(record) for record in found]
