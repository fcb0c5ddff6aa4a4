"""The stream again, from what the run published of itself: settings, and the plan as each shard lived it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.codec import text_in
from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress, progress_key
from ray_pipeline.errors import RecordError, StateMismatchError
from ray_pipeline.events import EventBatch, Fault
from ray_pipeline.fitted import FITTED_PREFIX
from ray_pipeline.generator.plan import ShardSchedule
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.model.catalogue import Catalogue, load_catalogue
from ray_pipeline.model.faults import Fates
from ray_pipeline.model.population import Movies, build_movies, build_user_map
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.truth.validity import ValidRecords
from ray_pipeline.windows.spec import iso_ms

__all__ = ["ProgressRecords", "ShardReplay", "build_models", "checked_run", "published_catalogue", "published_settings"]

_AT_ONCE = 1 << 18


def checked_run(settings: Settings, record: Any) -> dict[str, Any]:
    """Record ``run`` of topic ``ratings.progress``, if it is one: its parts fit each other.

    Args:
        settings: one's own.
        record: the value, read from JSON.

    Raises:
        RecordError: it is none.
    """
    try:
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
            msg = "it has no settings"
            raise ValueError(msg)
        for name in ("run", *(name for name in ("topic", "outside_topic") if name in record)):
            text_in(record, name)
        digest = settings.with_events(record["settings"]).digest(text_in(record, "catalogue"))
        if digest != text_in(record, "config"):
            msg = f"its settings and catalogue are those of configuration {digest}, not of {record['config'][:80]}"
            raise ValueError(msg)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(
            problem=f"record run of the progress topic is not what a run writes: {error}",
            fix="Write the true one again: a run does when it starts",
        ) from error
    return record


def published_catalogue(settings: Settings, run: Mapping[str, Any]) -> Catalogue:
    """The movies that a run's ratings may be of: the built-in catalogue of the run's own size, or the file that one names.

    Args:
        settings: one's own; ``catalog`` is used.
        run: record ``run`` of topic ``ratings.progress``.

    Raises:
        RecordError: it is no such record.
        CatalogueError: the file is missing, or a row is malformed.
    """
    run = checked_run(settings, run)
    # what one's own drift and attacks name has nothing to do with the run's movies
    names_nothing: dict[str, Any] = {"drift": (), "attack": ()}
    return load_catalogue(settings.model_copy(update={"movies": run["settings"]["movies"], **names_nothing}))


def published_settings(settings: Settings, run: Mapping[str, Any], catalogue: Catalogue) -> Settings:
    """One's own settings, with the event settings that a run published.

    Args:
        settings: one's own.
        run: record ``run`` of topic ``ratings.progress``.
        catalogue: the movies at hand.

    Raises:
        StateMismatchError: catalogue or model file at hand are not the run's, so that its ratings cannot be made again.
    """
    found = settings.with_events(run["settings"])
    if found.digest(catalogue.digest) != run["config"]:
        raise _another_world(settings, run, catalogue)
    return found


def _another_world(settings: Settings, run: Mapping[str, Any], catalogue: Catalogue) -> StateMismatchError:
    made, here = str(run["catalogue"]), catalogue.digest
    ratings = f"the ratings of run {run['run']} were made"
    if made.startswith(FITTED_PREFIX):
        which = (
            f"another model file ({made}, not {here})"
            if settings.model
            else f"a fitted model ({made}), and none is given"
        )
        return StateMismatchError(problem=f"{ratings} from {which}", fix="Give the run's own model file with --model")
    if settings.model:
        return StateMismatchError(problem=f"{ratings} with {made}, not from a fitted model", fix="Leave --model out")
    return StateMismatchError(
        problem=f"{ratings} with another catalogue ({made}, not {here})",
        fix="Give the run's own movies.csv with --catalog",
    )


def build_models(
    settings: Settings, catalogue: Catalogue, partitions: Iterable[int], movies: Movies | None = None
) -> dict[int, ShardModel]:
    """The models of some shards, by partition.

    Args:
        settings: the event settings are used.
        catalogue: the movies.
        partitions: which shards.
        movies: all movies, if they are made already.
    """
    movies = movies or build_movies(settings, catalogue)
    user_map = build_user_map(settings)
    return {p: ShardModel.of_shard(settings, p, user_map, movies) for p in partitions}


class ProgressRecords:
    """Reads the progress records of a run's shards, and tells them from what no shard of it can have written.

    Args:
        settings: with the run's events.
        run: record ``run`` of topic ``ratings.progress``.
    """

    def __init__(self, settings: Settings, run: Mapping[str, Any]) -> None:
        self._run = run
        self._partitions = settings.partitions
        self._poisson_seed = settings.seed if settings.arrivals == "poisson" else None
        self._shares = build_user_map(settings)
        self._schedules: dict[int, tuple[tuple[Epoch, ...], ShardSchedule]] = {}

    def read(self, key: str, record: Any) -> ShardProgress:
        """Take a record.

        Args:
            key: its key, ``shard/…``.
            record: its value, read from JSON; None = it has none.

        Raises:
            RecordError: it cannot be what the shard wrote.
        """
        said = ShardProgress.from_record(record)
        reason = f"it is of partition {said.partition}" if progress_key(said.partition) != key else self.untrue(said)
        if reason:
            raise RecordError(problem=f"progress record {key[:80]} cannot be what the shard wrote: {reason}")
        return said

    def untrue(self, said: ShardProgress) -> str:
        """Why a progress record cannot be what a shard of the run wrote; empty when it can."""
        if said.partition >= self._partitions:
            return f"the run has {self._partitions} partitions"
        for name, has, must in (
            ("run", said.run, self._run["run"]),
            ("configuration", said.config, self._run["config"]),
            ("share", said.share, self._shares.share(said.partition)),
            ("phase", said.phase, (said.partition + 0.5) / self._partitions),
            ("seed of arrivals", said.poisson_seed, self._poisson_seed),
        ):
            if has != must:
                return f"its {name} is {has}, must be {must}"
        try:
            schedule = self._schedule(said)
        except ValueError as error:
            return str(error)
        if said.next_index == 0 or said.event_time_ms is None:
            fits = said.next_index == 0 and said.event_time_ms is None
            return "" if fits else "its number of ratings and last time do not fit"
        due = schedule.plan.expected(said.event_time_ms + 1) * said.share
        if said.next_index > due + schedule.arrivals.spread(int(due)) + 2:
            return f"it says that {said.next_index:,} ratings were sent, its own plan has {due:,.0f} by {iso_ms(said.event_time_ms)}"
        due_ms = int(schedule.due_ms(said.next_index - 1, 1)[0])
        if due_ms == said.event_time_ms:
            return ""
        return (
            f"it says that rating {said.next_index - 1:,} was the last, of {iso_ms(said.event_time_ms)}, "
            f"but by its own plan that one is due at {iso_ms(due_ms) if due_ms < 10**14 else 'no time'}"
        )

    def _schedule(self, said: ShardProgress) -> ShardSchedule:
        """Of a shard, made anew only when its plan has changed."""
        epochs, schedule = self._schedules.get(said.partition, ((), None))
        if schedule is None or epochs != said.epochs:
            schedule = ShardSchedule.lived(said)
            self._schedules[said.partition] = said.epochs, schedule
        return schedule


class ShardReplay:
    """The ratings of one shard with their times.

    Args:
        model: draws them.
        progress: has the plan as the shard lived it.
        guard_ms: how far ahead of its sending an event time may lie for the job to take it, milliseconds; 0 = as far as it likes.
    """

    def __init__(self, model: ShardModel, progress: ShardProgress, guard_ms: int = 0) -> None:
        self.valid = None if model.faults is None else ValidRecords(model.faults, guard_ms)
        self.partition = model.partition
        self.model = model
        self.progress = progress
        self._sequence = ShardSequence.of(model, progress)

    def update(self, progress: ShardProgress) -> None:
        """Take a newer progress record of the same shard."""
        if progress.epochs != self.progress.epochs:
            self._sequence = ShardSequence.of(self.model, progress)
        else:
            self._sequence = replace(self._sequence, sent=progress.next_index)
        self.progress = progress

    def events(self, first: int, count: int) -> EventBatch:
        """Ratings ``first … first + count - 1``, as they were sent."""
        return self._sequence.events(first, count)

    def fates(self, first: int, count: int) -> Fates | None:
        """See :meth:`ShardSequence.fates`."""
        return self._sequence.fates(first, count)

    def valid_events(self, first: int, count: int) -> EventBatch:
        """Those of ratings ``first … first + count - 1`` that the job takes; their indexes need not follow one another."""
        events = self.events(first, count)
        if self.valid is None or events.faults is None:
            return events
        return events.where(~self.valid.rejects[events.faults])

    def records_read(self, valid: int) -> int:
        """How many records a job has read at least that has taken so many ratings."""
        return valid if self.valid is None else self.valid.records(valid)

    def newest(self, first: int, until: int) -> tuple[int, int] | None:
        """Of the ratings ``first … until - 1`` that the job takes: the newest event time, and when that one was sent.

        Returns:
            Epoch milliseconds; None when the job takes none of them.
        """
        return self._extreme(first, until, np.argmax)

    def oldest_ms(self, first: int, until: int) -> int | None:
        """The oldest event time of the ratings ``first … until - 1`` that the job takes, epoch milliseconds; None without any."""
        found = self._extreme(first, until, np.argmin)
        return None if found is None else found[0]

    def unread(self, first: int, until: int, start_ms: int, end_ms: int, before_ms: int) -> int:
        """How many of ratings ``first … until - 1`` name a time in a window and were sent before another made it final.

        Args:
            first: first index.
            until: last index, exclusive.
            start_ms: the window's start, epoch milliseconds.
            end_ms: its end.
            before_ms: when the rating was sent that made it final: what was sent later is too late by design.
        """
        found = 0
        for fates, taken in self._taken(first, until):
            assert self.model.faults is not None
            times, sent_ms = fates.times_ms, self.model.faults.sent_ms(fates.due_ms)
            found += int((taken & (times >= start_ms) & (times < end_ms) & (sent_ms < before_ms)).sum())
        return found

    def broken_on_purpose(self, first: int, until: int) -> dict[str, int]:
        """How many of records ``first … until - 1`` have which fault, by its name; those that none has are left out."""
        counts = np.zeros(len(Fault), np.int64)
        if self.valid is not None:
            for fates, _ in self._taken(first, until):
                counts += np.bincount(fates.faults, minlength=len(Fault))
        return {fault.name.lower(): int(counts[fault]) for fault in Fault if fault and counts[fault]}

    def due_ms(self, index: int) -> int:
        """See :meth:`ShardSequence.due_ms`."""
        return self._sequence.due_ms(index)

    def rate_at(self, event_ms: int) -> float:
        """Rate in force at an event time, ratings per second over all shards."""
        return self._sequence.schedule.plan.rate_at(event_ms)

    def first_at(self, times_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """See :meth:`ShardSequence.first_at`."""
        return self._sequence.first_at(times_ms)

    def count_before(self, event_ms: int) -> int:
        """How many ratings are due before an event time, epoch milliseconds, of those that may have been sent."""
        return int(self.first_at(np.array([event_ms], np.int64))[0])

    def first_in(self, event_ms: int) -> int:
        """Index of the first rating that the job takes and that may name an event time, epoch milliseconds, or a later one."""
        faults, ahead_ms = self.model.faults, 0
        if faults is not None and self.valid is not None:
            ahead_ms = max(0, faults.skew_ms + (0 if self.valid.rejects[Fault.FUTURE] else faults.future_ms))
        return self.count_before(event_ms - ahead_ms)

    def due_between(self, times_ms: npt.NDArray[np.int64]) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """See :meth:`ShardSequence.due_between`."""
        return self._sequence.due_between(times_ms)

    def times_ms(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """See :meth:`ShardSequence.times_ms`."""
        return self._sequence.times_ms(first, count)

    def at(self, event_ms: int) -> list[int]:
        """See :meth:`ShardSequence.at`."""
        return self._sequence.at(event_ms)

    def index_of(self, value: bytes | None, at_least: int = 0) -> int | None:
        """See :meth:`ShardSequence.index_of`."""
        return self._sequence.index_of(value, at_least)

    # -- inside

    def _taken(self, first: int, until: int) -> Iterator[tuple[Fates, npt.NDArray[np.bool_]]]:
        """Records in pieces, and which of them the job takes; only where faults are on."""
        assert self.valid is not None
        for start in range(first, until, _AT_ONCE):
            fates = self.fates(start, min(_AT_ONCE, until - start))
            assert fates is not None
            yield fates, ~self.valid.rejects[fates.faults]

    def _extreme(self, first: int, until: int, which: Callable[[Any], Any]) -> tuple[int, int] | None:
        if until <= first:
            return None
        if self.valid is None:
            due_ms = self.due_ms(until - 1 if which is np.argmax else first)
            return due_ms, due_ms
        found: list[tuple[int, int]] = []
        for fates, taken in self._taken(first, until):
            at = np.flatnonzero(taken)
            if len(at):
                best = at[which(fates.times_ms[at])]
                assert self.model.faults is not None
                sent_ms = self.model.faults.sent_ms(fates.due_ms[best : best + 1])
                found.append((int(fates.times_ms[best]), int(sent_ms[0])))
        return found[int(which([time for time, _ in found]))] if found else None
