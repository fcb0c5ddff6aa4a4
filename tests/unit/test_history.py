"""History: cut into tasks, sent in place of the actors, given back; the same ratings whoever makes them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.clock import FakeClock
from ray_pipeline.cluster import lending as lending_module
from ray_pipeline.cluster.lending import Lending
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.delivery.memory import MemoryDelivery, MemoryLog
from ray_pipeline.errors import ConfigurationError, FencedError, RayPipelineError
from ray_pipeline.events import EventBatch
from ray_pipeline.generator.coordination import Coordinator
from ray_pipeline.generator.placement import HAND_OVER_MS, Placement
from ray_pipeline.generator.runner import Assignment, RunnerState, ShardReport
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.history.loan import LentShard
from ray_pipeline.history.making import ModelSource, ratings
from ray_pipeline.history.ranges import ShardRange, cut
from ray_pipeline.history.sending import send_shard
from ray_pipeline.model.catalogue import load_catalogue

NOW_MS = 1_700_000_000_000
SHARES = [0.6, 0.4]


@pytest.fixture(scope="module")
def source() -> ModelSource:
    settings = load_settings(users=500, movies=200, partitions=2)
    return ModelSource(settings, load_catalogue(settings))


def lived(partition: int = 0, next_index: int = 0, **changes: object) -> ShardProgress:
    epochs = (Epoch(NOW_MS, 100.0),)
    found = ShardProgress("run", "config", partition, next_index, None, NOW_MS, epochs, SHARES[partition], 0.25)
    return replace(found, **changes)


# -- tasks


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(1, 9))
def test_tasks_have_all_ratings_once_and_about_as_many_each(lengths: list[int], tasks: int) -> None:
    shards = [ShardRange(p, 3, 3 + length) for p, length in enumerate(lengths)]
    found = cut(shards, tasks)
    made = [(r.partition, i) for task in found for r in task for i in range(r.first, r.stop)]
    assert made == [(r.partition, i) for r in shards for i in range(r.first, r.stop)]
    sizes = [sum(map(len, task)) for task in found]
    assert len(sizes) == tasks and max(sizes) - min(sizes) <= 1


@given(tasks=st.integers(1, 7))
def test_rows_do_not_depend_on_the_number_of_tasks(source: ModelSource, tasks: int) -> None:
    shards = [ShardRange(0, 0, 400), ShardRange(1, 10, 300)]
    progress = {p: lived(p) for p in range(2)}
    rows = [b for task in cut(shards, tasks) for b in ratings(source, progress, task)]
    table = pa.Table.from_batches(rows)
    assert table.column_names == ["partition", "index", "user_id", "movie_id", "rating", "timestamp"]
    assert table["index"].to_pylist() == [*range(400), *range(10, 300)]
    events = ShardSequence.of(source.model(0), progress[0]).events(0, 400)
    assert table["user_id"].to_pylist()[:400] == events.user_ids.tolist()
    assert table["rating"].to_pylist()[:400] == (events.half_stars / 2).tolist()
    assert table["timestamp"].to_pylist()[:400] == events.timestamps_ms.tolist()


# -- room for history in the plan


def coordinator(**changes: object) -> Coordinator:
    settings = load_settings(users=500, movies=200, partitions=2, rate=100, **changes)
    found = Coordinator(settings, "config", SHARES)
    found.observe([ShardReport(p, RunnerState.READY, 0, 0, None, 0.0, 0, "") for p in range(2)])
    return found


def events(source: ModelSource, told: Assignment, partition: int, first: int, stop: int) -> EventBatch:
    progress = lived(partition, epochs=told.epochs, share=told.share, phase=told.phase)
    return ShardSequence.of(source.model(partition), progress).events(first, stop - first)


def ended(told: dict[int, Assignment], source: ModelSource) -> list[ShardProgress | None]:
    """The shards' progress when all of it is sent."""
    found: list[ShardProgress | None] = []
    for p, a in sorted(told.items()):
        last_ms = int(events(source, a, p, a.end_index - 1, a.end_index).timestamps_ms[0])
        place = {"epochs": a.epochs, "share": a.share, "phase": a.phase}
        found.append(lived(p, a.end_index, event_time_ms=last_ms, **place))
    return found


def test_history_ends_now_and_live_ratings_follow_without_a_gap(source: ModelSource) -> None:
    found = coordinator()
    told = found.lend(NOW_MS, 1_000, [None, None])
    assert sum(a.end_index for a in told.values()) == 1_000
    times = sorted(t for p, a in told.items() for t in events(source, a, p, 0, a.end_index).timestamps_ms.tolist())
    assert NOW_MS - 10_000 <= times[0] < NOW_MS - 9_900 and NOW_MS - 100 < times[-1] <= NOW_MS + 1
    found.give_back(NOW_MS + 5_000)
    live = found.assignments(NOW_MS + 5_000)
    assert {a.clock.event_ms(NOW_MS) for a in live.values()} == {NOW_MS} and {a.end_index for a in live.values()} == {
        None
    }
    both = [
        t
        for p, a in live.items()
        for t in events(source, a, p, told[p].end_index, told[p].end_index + 200).timestamps_ms.tolist()
    ]
    assert times[-1] <= min(both) <= times[-1] + 50  # the next of 100 a second
    # and the plan is one, also for what was history
    assert all(
        (events(source, live[p], p, 0, 300).timestamps_ms == events(source, a, p, 0, 300).timestamps_ms).all()
        for p, a in told.items()
    )


def test_on_a_fixed_clock_the_plan_stays_and_the_clock_stands_behind_history(source: ModelSource) -> None:
    found, alone = coordinator(start_time_ms=1_000_000), coordinator(start_time_ms=1_000_000)
    without = alone.assignments(NOW_MS)
    told = found.lend(NOW_MS, 1_000, [None, None])
    assert {a.epochs for a in told.values()} == {a.epochs for a in without.values()}
    found.give_back(NOW_MS + 7_000)
    assert abs(found.event_now_ms(NOW_MS + 7_000) - 1_010_000) <= 20
    found.give_back(NOW_MS + 8_000)  # of a loan that was refused: the clock goes on
    assert abs(found.event_now_ms(NOW_MS + 8_000) - 1_011_000) <= 20
    again = found.lend(NOW_MS + 9_000, 500, ended(told, source))
    assert sum(a.end_index for a in again.values()) == 1_500
    assert {a.epochs for a in again.values()} == {a.epochs for a in without.values()}


def test_history_fills_a_pause_and_no_more_than_that(source: ModelSource) -> None:
    found = coordinator()
    told = found.lend(NOW_MS, 1_000, [None, None])
    sent = ended(told, source)
    found.give_back(NOW_MS)
    with pytest.raises(ConfigurationError, match="do not fit between the last rating and now"):
        found.lend(NOW_MS + 5_000, 501, sent)
    found.change(NOW_MS + 1_000, paused=True)
    more = found.lend(NOW_MS + 20_000, 1_000, sent)
    for p, a in more.items():
        times = events(source, a, p, told[p].end_index, a.end_index).timestamps_ms
        assert times[0] >= NOW_MS + 9_900 and times[-1] <= NOW_MS + 20_001
        assert (events(source, a, p, 0, 400).timestamps_ms == events(source, told[p], p, 0, 400).timestamps_ms).all()
    assert found.plan_rate(NOW_MS + 30_000) == 0.0  # it is paused as before


@pytest.mark.parametrize("bound", [{"ratings": 999}, {"duration_s": 9.9, "start_time_ms": 1_000_000}], ids=str)
def test_history_beyond_the_end_of_a_bounded_run_is_refused_and_changes_nothing(bound: dict[str, float]) -> None:
    found = coordinator(**bound)
    with pytest.raises(ConfigurationError, match="the run ends after"):
        found.lend(NOW_MS, 1_000, [None, None])
    told = found.assignments(NOW_MS)
    assert sum(a.end_index for a in told.values()) in (990, 999)
    part = coordinator(**bound)
    part.lend(NOW_MS, 600, [None, None])
    part.give_back(NOW_MS)
    assert sum(a.end_index for a in part.assignments(NOW_MS).values()) in (990, 999)


# -- in place of an actor


def lent(source: ModelSource, end: int) -> LentShard:
    return LentShard(lived(1), end)


def sent(source: ModelSource, settings: Settings, log: MemoryLog, end: int) -> int:
    return send_shard(settings, source, lent(source, end), lambda p: MemoryDelivery(log, p))


def test_a_task_sends_what_an_actor_would_and_one_that_runs_again_adds_nothing(source: ModelSource) -> None:
    log, again = MemoryLog(), MemoryLog()
    again.failures = ["send", "commit, done", "commit"]
    assert sent(source, source.settings, log, 20_000) == 20_000
    assert sent(source, source.settings, again, 12_000) == 12_000
    assert sent(source, source.settings, again, 20_000) == 20_000
    assert sent(source, source.settings, again, 20_000) == 20_000
    assert len(log.ratings[1]) == 20_000 and log.ratings[1] == again.ratings[1]
    assert log.progress[1].next_index == 20_000
    last = ShardSequence.of(source.model(1), lived(1)).events(19_999, 1)
    assert log.progress[1].event_time_ms == int(last.timestamps_ms[0])


def test_a_task_whose_shard_was_taken_over_ends_and_says_so(source: ModelSource) -> None:
    log = MemoryLog()

    class TakenOver(MemoryDelivery):
        def send(self, batch: EventBatch) -> None:
            super().send(batch)
            MemoryDelivery(log, batch.partition).open(1.0)

    with pytest.raises(FencedError, match="taken over at rating 0"):
        send_shard(source.settings, source, lent(source, 20_000), lambda p: TakenOver(log, p))
    assert log.ratings[1] == []


# -- actors let go


def test_shards_are_lent_when_all_actors_have_let_go_or_had_their_time() -> None:
    placement = Placement(4, 2)
    placement.lend(1_000)
    assert placement.of(0) == placement.of(1) == [] and not placement.lent
    placement.heard(0, [])
    placement.heard(1, [3])
    assert not placement.lent and placement.expire(1_000 + HAND_OVER_MS - 1) == {}
    assert placement.expire(1_000 + HAND_OVER_MS) == {3: 1} and placement.lent
    placement.take_back()
    assert (placement.of(0), placement.of(1), placement.lent) == ([0, 2], [1, 3], False)


@dataclass
class Lender:
    """The generator's side, with what it said."""

    lending: Lending
    placement: Placement
    clock: FakeClock
    coordinator: Coordinator
    notes: list[str]
    answers: dict[str, RayPipelineError | None]


def lender_of(monkeypatch: pytest.MonkeyPatch, **changes: object) -> Lender:
    found = coordinator(**changes)
    placement, clock = Placement(2, 1), FakeClock(NOW_MS)
    notes: list[str] = []
    answers: dict[str, RayPipelineError | None] = {}
    monkeypatch.setattr(lending_module, "read_compacted", lambda *_: {})
    place = (load_settings(partitions=2), "", found, placement, threading.RLock(), clock)
    return Lender(Lending(*place, notes.append, answers.__setitem__), placement, clock, found, notes, answers)


@pytest.fixture
def lender(monkeypatch: pytest.MonkeyPatch) -> Lender:
    return lender_of(monkeypatch)


def lend_out(lender: Lender, number: int) -> None:
    lender.lending.begin("a", number)
    lender.lending.step()
    assert lender.lending.record is None and lender.answers == {}  # the actor has not let go yet
    lender.placement.heard(0, [])
    lender.lending.step()


def test_a_loan_has_what_the_coordinator_told_and_ends_when_it_is_given_back(lender: Lender) -> None:
    lend_out(lender, 1_000)
    assert lender.answers == {"a": None} and lender.lending.record is not None
    shards = lender.lending.record["shards"]
    assert [s["partition"] for s in shards] == [0, 1] and sum(s.pop("end") for s in shards) == 1_000
    assert all(ShardProgress.from_record(s).epochs[0].rate == 100.0 for s in shards)
    with pytest.raises(ConfigurationError, match="under way"):
        lender.lending.begin("b", 5)
    lender.lending.end("b")
    assert lender.lending.active and lender.placement.of(0) == []
    lender.lending.end("a")
    assert not lender.lending.active and lender.placement.of(0) == [0, 1]


def test_a_borrower_who_falls_silent_loses_the_shards(lender: Lender) -> None:
    lend_out(lender, 1_000)
    for _ in range(4):
        lender.clock.advance(10)
        lender.lending.keep("a")
        lender.lending.step()
        assert lender.lending.active
    lender.clock.advance(16)
    lender.lending.step()
    assert not lender.lending.active and lender.placement.of(0) == [0, 1]
    assert "nobody has kept" in lender.notes[-1]
    # what he left of history is due for the actors
    told = lender.coordinator.assignments(lender.clock.now_ms())
    assert {a.epochs[0].from_ms for a in told.values()} == {NOW_MS - 10_000}


def test_a_loan_that_cannot_be_is_refused_and_the_actors_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lender = lender_of(monkeypatch, ratings=5)
    with pytest.raises(ConfigurationError, match="cannot be made"):
        lender.lending.begin("a", 0)
    lend_out(lender, 6)
    assert "the run ends after 5 ratings" in str(lender.answers["a"])
    assert not lender.lending.active and lender.placement.of(0) == [0, 1]


@pytest.mark.parametrize("clock", [{"start_time_ms": 1_000_000}, {"start_time_ms": 1_000_000, "speed": "max"}], ids=str)
def test_history_beyond_the_end_of_a_plan_is_refused_and_changes_nothing(clock: dict[str, object]) -> None:
    settings = load_settings(users=500, movies=200, partitions=2, plan="100 for 10s", **clock)
    found = Coordinator(settings, "config", SHARES)
    with pytest.raises(ConfigurationError, match="the plan ends before 1001 ratings more"):
        found.lend(NOW_MS, 1_001, [None, None])
    assert sum(a.end_index for a in found.lend(NOW_MS, 900, [None, None]).values()) == 900
