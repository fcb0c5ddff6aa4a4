"""One rating explained beside what is in Kafka at its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from confluent_kafka import KafkaException

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.config import Settings
from ray_pipeline.errors import BrokerUnavailableError, UncheckedError
from ray_pipeline.formats.factory import open_format
from ray_pipeline.kafka.read import Record, read_topic_from
from ray_pipeline.model.catalogue import Catalogue, load_catalogue
from ray_pipeline.truth.audit import Finding, PartitionAudit
from ray_pipeline.truth.explain import explain
from ray_pipeline.truth.follower import Follower
from ray_pipeline.truth.replay import ShardReplay, build_models
from ray_pipeline.verification.audit import PublishedRun, published_run
from ray_pipeline.verification.outside import OutsideLedger
from ray_pipeline.windows.spec import window_specs

__all__ = ["Explainer"]

_NEAR = 200
_PROBED = 8
_READ_MOST = 20_000
_GAP_MOST = 2_000
_AT_ONCE = 20  # the audit lists no more of a kind
_AHEAD_MOST = 1_000_000
"""A rating so far behind the last one that was sent is not made: where arrivals are random, all before it would have to be."""
_OFFSETS_MOST = 2**53


@dataclass
class _Gap:
    """A piece of a partition in which records stand that are no ratings of the shard.

    Attributes:
        before: the rating that stands before it; -1 = none does.
        strangers: its records.
        behind: the rating that stands behind it; None at the end of the partition.
    """

    before: int
    strangers: list[Record]
    behind: int | None = None


class Explainer:
    """Explains ratings of a run.

    Args:
        settings: names the progress topic and the catalogue; events and windows are the run's own, and so are the other topics
            but for those that were given by name.
        bootstrap: brokers, HOST:PORT[,…].

    Raises:
        UncheckedError: there is no run, or it cannot be regenerated here.
        BrokerUnavailableError: the broker does not answer.
    """

    def __init__(self, settings: Settings, bootstrap: str) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._replays: dict[int, ShardReplay] = {}
        with _asking(bootstrap):
            self._run: PublishedRun = published_run(settings, bootstrap).at_its_topics()
        self._know_run()

    def refresh(self) -> None:
        """Read again what the run publishes: it may have gone on, or changed its rate, or be another one."""
        before = self._run.run
        with _asking(self._bootstrap):
            self._run = published_run(self._settings, self._bootstrap).at_its_topics()
        if (before["run"], before["config"]) != (self._run.run["run"], self._run.run["config"]):
            self._outside.close()
            self._know_run()
            return
        for partition, replay in self._replays.items():
            if partition in self._run.progress:
                replay.update(self._run.progress[partition])

    def by_index(self, partition: int, index: int) -> dict[str, Any]:
        """Explain rating ``index`` of a partition; ``kafka`` has the record that stands where it must, None where none does.

        That record ``agrees``, or ``differs`` says in which fields it does not.

        Raises:
            UncheckedError: there is no such partition, the index is below 0 or far ahead, or the plan does not reach it.
            BrokerUnavailableError: the broker does not answer.
        """
        if index < 0:
            raise UncheckedError(problem=f"index {index} is below 0", fix="Ratings are counted from 0")
        replay = self._replay(partition)
        sent = replay.progress.next_index
        if index >= sent + _AHEAD_MOST:
            raise UncheckedError(
                problem=f"rating {index:,} of partition {partition} is far ahead: the shard has sent {sent:,}",
                fix=f"Give an index below {sent + _AHEAD_MOST:,}",
            )
        found = explain(replay, index, self._run.settings, self._catalogue, window_specs(self._run.settings))
        with _asking(self._bootstrap):
            record, differs = self._standing_for(replay, index)
        return {**found, "kafka": None if record is None else _shown(record, differs)}

    def by_offset(self, partition: int, offset: int) -> dict[str, Any]:
        """Explain the record at an offset, or the next data record; ``foreign`` when it is no rating of the run.

        One that was altered is explained as the rating that it once was, and ``differs`` says how. A foreign one has ``outside``:
        whether it is a rating that was posted and so accounted for.

        Raises:
            UncheckedError: there is no such partition or record.
            BrokerUnavailableError: the broker does not answer.
        """
        replay = self._replay(partition)
        with _asking(self._bootstrap):
            record = next(iter(self._read(partition, offset)), None) if 0 <= offset < _OFFSETS_MOST else None
            if record is None:
                raise UncheckedError(
                    problem=f"partition {partition} has no record at offset {offset} or behind it",
                    fix="See ray-pipeline topics count for what there is",
                )
            index, differs = self._index_of(replay, record)
            outside = index is None and self._outside.refresh().holds(
                partition, record.offset, _key(record), record.value
            )
        if index is None:
            return {
                "partition": partition,
                "index": None,
                "foreign": True,
                "outside": outside,
                "kafka": _shown(record, None),
            }
        found = explain(replay, index, self._run.settings, self._catalogue, window_specs(self._run.settings))
        return {**found, "kafka": _shown(record, differs)}

    # -- inside

    def _know_run(self) -> None:
        """Everything that follows from which run it is."""
        self._replays.clear()
        self._outside = OutsideLedger(self._run.settings, self._bootstrap)
        self._wire = open_format(self._run.settings)
        self._catalogue: Catalogue = load_catalogue(self._run.settings)

    def _replay(self, partition: int) -> ShardReplay:
        if partition not in self._run.progress:
            known = ", ".join(map(str, sorted(self._run.progress))) or "none"
            raise UncheckedError(
                problem=f"partition {partition} has no ratings of this run", fix=f"The partitions are: {known}"
            )
        if partition not in self._replays:
            settings = self._run.settings
            model = build_models(settings, self._catalogue, [partition])[partition]
            self._replays[partition] = ShardReplay(model, self._run.progress[partition], settings.guard_ms)
        return self._replays[partition]

    def _read(self, partition: int, offset: int) -> Iterator[Record]:
        """Records of a partition from an offset on, their values in the contract's form where they are in the run's format."""
        topic = self._run.settings.ratings_topic
        for record in read_topic_from(self._bootstrap, topic, partition, max(0, offset)):
            yield replace(record, value=self._wire.from_wire([record.value])[0])

    def _posted(self, record: Record) -> bool:
        """Whether a record is a rating that was posted from outside."""
        return self._outside.ratings.holds(record.partition, record.offset, _key(record), record.value)

    def _index_of(self, replay: ShardReplay, record: Record) -> tuple[int | None, str]:
        """Which rating a record is, or once was, and how it differs from that; None when it is none."""
        if replay.valid is None:
            index = replay.index_of(record.value)
        else:  # one that is broken on purpose follows from those that stand before it
            named = self._named(replay, record.offset - _NEAR)
            index = next((i for there, i in named if there.offset >= record.offset), None)
        if index is not None:
            return index, _difference(replay, index, record)
        gap = self._gap(replay, record.offset - _NEAR, lambda there, _: there.offset > record.offset)
        altered = _altered(replay, gap).get(record.offset)
        return (None, "") if altered is None else (altered.index, altered.detail)

    def _standing_for(self, replay: ShardReplay, index: int) -> tuple[Record | None, str]:
        """The record of a rating, or else the one that stands in its place, and how it differs."""
        start = self._before(replay, index) - _NEAR
        for record, there in self._named(replay, start):
            if there == index:
                return record, _difference(replay, index, record)
            if there is not None and there > index + _NEAR:
                break
        gap = self._gap(replay, start, lambda _, there: there > index)
        altered = next((found for found in _altered(replay, gap).values() if found.index == index), None)
        if altered is None:
            return None, ""
        return next(record for record in gap.strangers if record.offset == altered.offset), altered.detail

    def _before(self, replay: ShardReplay, index: int) -> int:
        """An offset at which, or soon behind which, a rating stands if it does: others' records and markers take offsets too."""
        low, high, guess = 0, None, index
        while high is None or low < high:
            near = self._probe(replay, guess, high)
            if near is not None and index - _NEAR <= near[1] <= index:
                return guess
            if near is None or near[1] > index:
                high = guess
            else:
                low = guess + 1
            guess = max(low, near[0] + index - near[1]) if near else guess
            if high is not None and guess >= high:
                guess = (low + high) // 2
        return low

    def _probe(self, replay: ShardReplay, offset: int, until: int | None) -> tuple[int, int] | None:
        """Of the next few ratings from an offset on, the last one's offset and index: one that is there again may come before it."""
        found = []
        for count, record in enumerate(self._read(replay.partition, offset)):
            if until is not None and record.offset >= until:
                break
            _require_few(count)
            index = replay.index_of(record.value)
            if index is not None:
                found.append((record.offset, index))
            if len(found) == _PROBED:
                break
        return max(found, key=lambda place: place[1], default=None)

    def _named(self, replay: ShardReplay, offset: int) -> Iterator[tuple[Record, int | None]]:
        """Records from an offset on, each with the index of the rating that it is; None when it is none."""
        follower = Follower(replay, None)
        for count, record in enumerate(self._read(replay.partition, offset)):
            _require_few(count)
            yield record, follower.index_of(record.value)

    def _gap(self, replay: ShardReplay, offset: int, past: Callable[[Record, int], bool]) -> _Gap:
        """The records between two ratings of the shard that are none, without posted ones.

        Args:
            replay: the shard.
            offset: from where on to look.
            past: whether a record that is the rating with an index stands behind what is looked for.
        """
        self._outside.refresh()
        gap = _Gap(-1, [])
        for record, index in islice(self._named(replay, offset), _GAP_MOST):
            if index is None:
                if not self._posted(record):
                    gap.strangers.append(record)
            elif not past(record, index):
                gap = _Gap(index, []) if index > gap.before else gap
            elif replay.index_of(record.value, index) == index and index > gap.before:
                gap.behind = index
                break
        return gap


def _altered(replay: ShardReplay, gap: _Gap) -> dict[int | None, Finding]:
    """Those strangers that once were ratings of the gap, by offset: as the audit finds them."""
    found: dict[int | None, Finding] = {}
    before = gap.before
    for first in range(0, len(gap.strangers), _AT_ONCE):
        strangers = gap.strangers[first : first + _AT_ONCE]
        end = before + 1 + len(strangers) if gap.behind is None else gap.behind + 1
        around = ([before] if before >= 0 else []), ([] if gap.behind is None else [gap.behind])
        ahead, after = ([_rating(replay, index) for index in indexes] for indexes in around)
        rows = [*ahead, *((_key(r), r.value) for r in strangers), *after]
        offsets = [-1] * len(ahead) + [r.offset for r in strangers] + [-1] * len(after)
        check = PartitionAudit(replay, end, max(0, before), bounded=True)
        check.take([key for key, _ in rows], [value for _, value in rows], offsets.__getitem__)
        findings = [finding for finding in check.finish().findings if finding.kind == "altered"]
        found.update({finding.offset: finding for finding in findings})
        before = max([before, *(finding.index for finding in findings if finding.index is not None)])
    return found


def _difference(replay: ShardReplay, index: int, record: Record) -> str:
    """How the record of a rating differs from it: in its key, or in how it is written; empty when not at all."""
    found = _altered(replay, _Gap(index - 1, [record])).get(record.offset)
    return "" if found is None else found.detail


def _rating(replay: ShardReplay, index: int) -> tuple[bytes, bytes | None]:
    events = replay.events(index, 1)
    return encode_keys(events)[0], encode_values(events)[0]


def _key(record: Record) -> bytes | None:
    return None if record.key is None else record.key.encode()


def _require_few(count: int) -> None:
    if count >= _READ_MOST:
        raise UncheckedError(
            problem=f"{_READ_MOST:,} records near that place do not tell which rating stands there",
            fix="See ray-pipeline audit, which looks at all of them",
        )


def _shown(record: Record, differs: str | None) -> dict[str, Any]:
    """A record, beside the rating that must stand there: how it differs from it; None = it is to be none."""
    return {
        "offset": record.offset,
        "timestamp_ms": record.timestamp_ms,
        "key": record.key,
        "value": None if record.value is None else record.value.decode(errors="replace"),
        "agrees": differs == "",
        "differs": differs or "",
    }


@contextmanager
def _asking(bootstrap: str) -> Iterator[None]:
    """What the broker did not answer is said in the terms of this system."""
    try:
        yield
    except KafkaException as error:
        raise BrokerUnavailableError(
            problem=f"the topics at {bootstrap} cannot be read ({error.args[0].str()})",
            fix="Check --bootstrap-servers, and that the broker runs",
        ) from None
