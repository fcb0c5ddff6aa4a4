"""Pipelines on a Ray cluster: found by the names of their actors, told apart, stopped; what they hold."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.exceptions import RayActorError

from ray_pipeline.clock import FakeClock
from ray_pipeline.cluster import directory, fleet, membership, supervised
from ray_pipeline.cluster.files import SharedFiles
from ray_pipeline.cluster.membership import Member, Owner, held_by_process, held_together, place_of
from ray_pipeline.cluster.supervised import SupervisedActor
from ray_pipeline.config import load_settings
from ray_pipeline.errors import ConfigurationError, StageFailedError
from ray_pipeline.generator.placement import Placement
from ray_pipeline.pipeline import Pipeline, Summary


def owner(name: str, *stages: str, pid: int = 1, node: str = "elsewhere", has_ray: bool = False) -> Owner:
    return Owner(name, stages, f"{name}:9092", node, pid, 0.0, has_ray)


class Worker(Member):
    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "generator": {"state": "running"}}


class SparkHolder(Member):
    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "job": {"state": "running", "batch": 3}}


@dataclass
class Cluster:
    """A Ray of named actors, all in this process; one that is dead answers nothing."""

    actors: dict[str, Any] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    joined: bool = True

    def add(self, member: Member, whose: Owner, stage: str, *which: str) -> None:
        self.actors[whose.actor_name(stage, *which)] = member

    def end(self, name: str) -> None:
        self.actors = {key: actor for key, actor in self.actors.items() if f"/{name}/" not in key}

    # what Ray has

    def list_named_actors(self, all_namespaces: bool) -> list[dict[str, str]]:
        assert all_namespaces
        return [{"name": name, "namespace": "somewhere"} for name in (*self.actors, "an actor of somebody else's")]

    def get_actor(self, name: str, namespace: str) -> Any:
        def method(called: str) -> Any:
            return SimpleNamespace(remote=lambda *given: (name, called, given))

        return SimpleNamespace(**{called: method(called) for called in ("describe", "ask_to_stop", "run_batch")})

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references, []

    def get(self, reference: Any, **_: Any) -> Any:
        name, called, given = reference
        if name in self.dead:
            raise RayActorError
        return getattr(self.actors[name], called)(*given)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "here", gcs_address="127.0.0.1:1")

    def shutdown(self) -> None:
        self.joined = False


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Three pipelines: a generator, a Spark job on its topics, and both in one."""
    cluster = Cluster()
    monkeypatch.setattr(directory, "ray", cluster)
    monkeypatch.setattr(directory, "list_named_actors", cluster.list_named_actors)
    first, second, whole = owner("a-1", "generate"), owner("b-2", "process"), owner("c-3", "generate", "process")
    for number in range(2):
        cluster.add(Worker(first), first, "generate", f"{number}-170-0")
    cluster.add(SparkHolder(second), second, "process")
    cluster.add(Worker(whole), whole, "generate", "0-170-0")
    cluster.add(SparkHolder(whole), whole, "process")
    return cluster


def asked(cluster: Cluster) -> set[str]:
    found = {name for name, actor in cluster.actors.items() if actor._stop_asked}
    return {place[0] for name in found if (place := place_of(name)) is not None}


def test_every_pipeline_is_found_whichever_stages_it_runs(cluster: Cluster) -> None:
    rows = directory.pipelines()
    assert [(r["name"], r["stages"], r["generator"], r["job"].get("batch")) for r in rows] == [
        ("a-1", ["generate"], {"state": "running", "actors": 2}, None),
        ("b-2", ["process"], {}, 3),
        ("c-3", ["generate", "process"], {"state": "running", "actors": 1}, 3),
    ]
    assert rows[0]["bootstrap_servers"] == "a-1:9092" and rows[0]["pid"] == 1


def test_a_pipeline_whose_actors_do_not_answer_is_shown_as_that(cluster: Cluster) -> None:
    cluster.dead = {name for name in cluster.actors if "/b-2/" in name}
    row = directory.pipelines()[1]
    assert (row["name"], row["stages"], row["job"]) == ("b-2", ["process"], {"state": "no answer"})
    with pytest.raises(StageFailedError, match="no actor of the pipeline b-2 answers"):
        directory.stop_pipeline("b-2", 1.0)


def test_who_is_stopped_by_name_is_asked_and_nobody_else(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory.time, "sleep", lambda _: cluster.end("b-2"))
    before = dict(cluster.actors)
    directory.stop_pipeline("b-2", 60.0)  # returns when its actors are gone
    cluster.actors = before
    assert asked(cluster) == {"b-2"}


def test_one_that_does_not_stop_in_time_is_no_success(cluster: Cluster) -> None:
    with pytest.raises(StageFailedError, match="a-1 was told to stop, and has not ended within 0 s"):
        directory.stop_pipeline("a-1", 0.0)
    assert asked(cluster) == {"a-1"}


def test_a_cluster_that_ends_with_its_pipeline_is_left_before(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = owner("d-4", "process", has_ray=True)
    cluster.add(SparkHolder(own), own, "process")
    listens = iter((True, False))
    monkeypatch.setattr(directory, "unanswered", lambda *_: "" if not cluster.joined and next(listens) else "refused")
    monkeypatch.setattr(directory.time, "sleep", lambda _: None)
    directory.stop_pipeline("d-4", 60.0)
    assert asked(cluster) == {"d-4"} and not cluster.joined and next(listens, None) is None


def test_a_name_that_nobody_has_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ConfigurationError, match="'nobody'"):
        directory.stop_pipeline("nobody", 1.0)
    assert asked(cluster) == set()


@pytest.mark.parametrize("stage", ["process", "serve", "verify"])
def test_a_pipeline_of_any_stage_ends_when_its_actor_was_asked(stage: str) -> None:
    pipeline = Pipeline(stages=(stage,))
    actor = SimpleNamespace(stop_asked=False, status={}, check=lambda: None)
    held = {"process": "_processing", "serve": "_serving", "verify": "_verifying"}[stage]
    setattr(pipeline, held, actor)
    end = threading.Event()
    end.set()
    assert pipeline.wait(end) is False
    actor.stop_asked = True
    assert pipeline.wait() is True


class RayHere:
    """Actors that are made in this process and answer at once."""

    made: ClassVar[list[Any]] = []

    @classmethod
    def remote(cls, **_: Any) -> Any:
        def make(kind: Any, *arguments: Any) -> Any:
            cls.made.append(actor := kind(*arguments))
            return SimpleNamespace(exchange=SimpleNamespace(remote=actor.exchange))

        return lambda kind: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=functools.partial(make, kind)))

    @staticmethod
    def wait(references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references, []

    @staticmethod
    def get(reference: Any, **_: Any) -> Any:
        return reference

    @staticmethod
    def get_runtime_context() -> Any:
        return SimpleNamespace(get_node_id=lambda: "here", get_assigned_resources=lambda: {"CPU": 0.25})


def test_a_generator_actor_that_was_asked_passes_it_on_and_says_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "ray", RayHere)
    monkeypatch.setattr(membership, "ray", RayHere)
    settings, mine = load_settings(users=100, movies=50), owner("a-1", "generate")
    placement = Placement(partitions=0, actors=1)
    no_movies: Any = SimpleNamespace(get=lambda: None)  # an actor without partitions needs none
    actors = fleet.Fleet(settings, mine, no_movies, SharedFiles(), placement, FakeClock(), lambda _: None)
    actors.grow(2)
    actors.exchange({}, stop=False, state="running")
    assert not actors.stop_asked
    assert [held["cpus"] for held in actors.held()] == [0.25, 0.25] and actors.held()[0]["memory_bytes"] > 0
    last = RayHere.made[-1]
    assert last.describe()["generator"] == {"state": "running"} and last.describe()["name"] == "a-1"
    last.ask_to_stop()
    actors.exchange({}, stop=False)
    assert actors.stop_asked


def test_a_stages_actor_that_was_asked_and_dies_then_has_passed_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "ray", RayHere)
    said = iter([{"state": "running"}, {"state": "running", "stop_asked": True}])
    handle = SimpleNamespace(
        start=SimpleNamespace(remote=lambda: None),
        status=SimpleNamespace(remote=lambda: next(said, {"state": "running", "stop_asked": False})),
    )
    actor = SupervisedActor("the stage", lambda: handle, lambda _: None, FakeClock())
    actor._handle, actor._starting = handle, "its start"
    actor._finish_start()
    assert not actor.stop_asked
    for _ in range(2):
        actor._poll()
    assert actor.stop_asked and actor.status["stop_asked"] is False


def test_what_is_held_is_measured_and_adds_up() -> None:
    mine = held_by_process(os.getpid(), 0.25)
    assert mine["cpus"] == 0.25 and mine["memory_bytes"] > 10_000_000 and mine["processes"] == 1
    nobody = held_by_process(2**22 + 1)
    assert nobody == {"cpus": 0.0, "memory_bytes": 0, "processes": 0}
    both = held_together([mine, mine])
    assert both == {"cpus": 0.5, "memory_bytes": 2 * mine["memory_bytes"], "processes": 2}
    assert held_together([mine, {**mine, "memory_bytes": None}])["memory_bytes"] is None  # not half the truth


def test_the_status_counts_the_windows_of_this_run_closed_ones_too() -> None:
    pipeline = Pipeline(stages=("process",))
    ledger = {"open": {"60000": 5, "120000": 7}, "closed_windows": 3}
    job: dict[str, Any] = {"state": "running", "ledger": ledger, "counted": 40}
    restored = dict.fromkeys(("batch", "records", "counted", "late_dropped", "rejected"), 0) | {"closed_windows": 3}
    job |= {f"restored_{name}": value for name, value in restored.items()}
    pipeline._processing = SimpleNamespace(status=job)
    assert pipeline.status().windows == 2
    ledger["closed_windows"] = 30
    assert pipeline.status().windows == 29


def summary_of(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, delivered: int, base: int, **job: int) -> Summary:
    pipeline._processing = SimpleNamespace(status=job, check=lambda: None)
    totals = SimpleNamespace(delivered=delivered, base=base)
    coordinator = SimpleNamespace(requested=delivered)
    pipeline._generator = SimpleNamespace(totals=lambda: totals, check=lambda: None, coordinator=coordinator)
    monkeypatch.setattr(pipeline, "_count_windows", lambda after_batch: after_batch)
    pipeline.check()
    return pipeline._summarize()


@pytest.mark.parametrize(("read", "unread"), [(1000, 0), (990, 10)])
def test_a_runs_summary_has_nothing_of_the_runs_before(read: int, unread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 records before 100 were broken, and 50 too late; the last ten may not have been read yet."""
    before = {"batch": 9, "records": read, "counted": 850 - unread, "late_dropped": 50, "rejected": 100}
    job = {f"restored_{name}": value for name, value in (before | {"closed_windows": 3}).items()}
    now = {"counted": 850 + 240, "late_dropped": 50 + 20, "rejected": 100 + 40}
    found = summary_of(Pipeline(), monkeypatch, 300, 1000, **job, **now)
    assert (found.delivered, found.counted, found.late_dropped, found.rejected) == (300, 240, 20, 40)
    assert found.windows == 9


def test_a_spark_job_that_is_begun_again_leaves_the_summary_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python too, where nobody may ever ask for the status."""
    names = ("batch", "records", "counted", "late_dropped", "rejected", "closed_windows")
    pipeline = Pipeline()
    summary_of(pipeline, monkeypatch, 10, 0, counted=10, **{f"restored_{name}": 0 for name in names})
    again = {f"restored_{name}": 600 for name in names}
    found = summary_of(pipeline, monkeypatch, 1000, 0, counted=940, late_dropped=40, rejected=20, **again)
    assert (found.counted, found.late_dropped, found.rejected, found.windows) == (940, 40, 20, 0)
    assert found.first_window_s is not None
