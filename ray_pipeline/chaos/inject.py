"""Carries faults out. Whatever it stops it lets go on again, also when it is interrupted itself."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ray_pipeline.chaos.child import ChildRun
from ray_pipeline.chaos.observer import Observer
from ray_pipeline.chaos.plan import Fault, Kind
from ray_pipeline.chaos.victims import ProcessRow, ProcessTree, Role, roles
from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.errors import BrokerUnavailableError, StageFailedError
from ray_pipeline.kafka.client import make_producer

__all__ = ["Injected", "Injector", "phase_of"]

_ANSWER_S = 60.0  # the broker may be away just now
_VICTIM_S = 60.0
_POLL_S = 0.05
_GUARD_EXTRA_S = 5.0
_IN_COMMIT_MS = 20
_RAY_NODE = ("gcs_server", "raylet")
_WITHOUT_RAY_S = 120.0
"""Ray itself gives up after 60 s without its GCS."""
_GONE_S = 120.0
"""Ray's agents look for a GCS that is gone for a minute before they end."""


@dataclass(frozen=True, slots=True)
class Injected:
    """What was done.

    Attributes:
        begun_ms: when it began, epoch milliseconds.
        over_ms: when the pipeline could begin to recover, epoch milliseconds.
        detail: what was hit, for people.
        skipped: why nothing was done; empty when something was.
        failed: why the pipeline did not do as it was told; empty when it did.
    """

    begun_ms: int
    over_ms: int
    detail: str
    skipped: str = ""
    failed: str = ""


def phase_of(age_ms: int, interval_ms: int) -> str:
    """Where in its life a shard was hit.

    Args:
        age_ms: how long before the kill the last commit that readers see had begun, milliseconds.
        interval_ms: time between commits, milliseconds.

    Returns:
        ``inside, done``: the commit under way went through; ``after``; ``before`` the next; ``inside, undone``: the next was due or
        under way and was aborted.
    """
    if age_ms <= _IN_COMMIT_MS:
        return "inside, done"
    if age_ms >= interval_ms:
        return "inside, undone"
    return "after" if age_ms <= interval_ms * 0.6 else "before"


class Injector:
    """Carries faults out against one run.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        tree: the run's processes.
        observer: sees what the run publishes.
        clock: tells the time.
        rate: the rate at the start, ratings per second.
        end: ends every waiting when set.
        child: the run, where the storm has started it.
    """

    def __init__(
        self,
        settings: Settings,
        bootstrap: str,
        tree: ProcessTree,
        observer: Observer,
        clock: Clock,
        rate: float,
        end: threading.Event,
        child: ChildRun | None = None,
    ) -> None:
        self.rate = rate
        self.base_rate = rate
        self._settings = settings
        self._bootstrap = bootstrap
        self._tree = tree
        self._observer = observer
        self._clock = clock
        self._end = end
        self._child = child
        self._of_ended: list[tuple[int, list[ProcessRow]]] = []  # of runs that were killed: when all must be gone
        self._shard_hit: dict[int, int] = {}
        self._ways: dict[Kind, Callable[[Fault], str]] = {
            Kind.KILL_GENERATOR: lambda fault: self._kill(fault, Role.GENERATOR),
            Kind.STOP_GENERATOR: lambda fault: self._stop_for(Role.GENERATOR, fault),
            Kind.KILL_IN_COMMIT: self._kill_in_commit,
            Kind.KILL_BROKER: lambda fault: self._kill(fault, Role.BROKER),
            Kind.STOP_BROKER: lambda fault: self._stop_for(Role.BROKER, fault),
            Kind.KILL_EXECUTOR: lambda fault: self._kill(fault, Role.EXECUTOR),
            Kind.KILL_DRIVER: lambda fault: self._kill(fault, Role.DRIVER, Role.DRIVER_JVM),
            Kind.KILL_MASTER: lambda fault: self._kill(fault, Role.MASTER),
            Kind.KILL_SERVING: lambda fault: self._kill(fault, Role.SERVING),
            Kind.KILL_ORACLE: lambda fault: self._kill(fault, Role.VERIFYING),
            Kind.KILL_RUN: self._kill_run,
            Kind.KILL_RAY: self._kill_ray,
            Kind.RESCALE: self._rescale,
            Kind.RATE: self._change_rate,
            Kind.PAUSE: self._pause,
        }

    def inject(self, fault: Fault) -> Injected:
        """Carry a fault out; returns when it is over, that is when recovery can begin.

        Raises:
            EnvironmentProblem: the run has ended.
        """
        begun_ms = self._clock.now_ms()
        try:
            detail = self._ways[fault.kind](fault)
        except LookupError as error:
            return Injected(begun_ms, self._clock.now_ms(), "", skipped=str(error))
        except (BrokerUnavailableError, StageFailedError) as error:
            self.rate = float(self._observer.record("generator").get("target_rate", self.rate))
            return Injected(begun_ms, self._clock.now_ms(), "", failed=str(error))
        return Injected(begun_ms, self._clock.now_ms(), detail)

    def restore(self) -> None:
        """Let a pipeline that was left paused, or at another rate, go on as it was.

        Raises:
            StageFailedError: the generator does not answer.
            BrokerUnavailableError: the broker does not.
        """
        if self._observer.record("generator").get("state") == "paused":
            self._tell("resume")
        if self.rate != self.base_rate:
            self._tell("rate", rate=self.base_rate)
            self.rate = self.base_rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The generator sends nothing for so long.

        Raises:
            StageFailedError: the generator does not answer.
            BrokerUnavailableError: the broker does not.
        """
        self._tell("pause")
        try:
            yield
        finally:
            self._tell("resume")

    # -- processes

    def _kill(self, fault: Fault, *of: Role) -> str:
        victim = self._victim(of, float(fault.parameters["pick"]))
        self._tree.signal(victim, signal.SIGKILL)
        return victim.title

    def _kill_run(self, _fault: Fault) -> str:
        """What it started must end with it (:meth:`outlived`)."""
        child, killed, rows = self._own_run(), self._tree.pid, self._tree.rows()
        child.kill()
        self._go_on(child, rows)
        return f"run {killed}"

    def _kill_ray(self, fault: Fault) -> str:
        """Without its Ray the run must end, and say so."""
        child, rows = self._own_run(), self._tree.rows()
        node = [row for row in self.roles().get(Role.RAY, ()) if row.name in _RAY_NODE]
        if not node:
            msg = "the run has no Ray of its own"
            raise LookupError(msg)
        victim = node[min(int(float(fault.parameters["pick"]) * len(node)), len(node) - 1)]
        self._tree.signal(victim, signal.SIGKILL)
        child.wait_for_failure(_WITHOUT_RAY_S)
        self._go_on(child, rows)
        return victim.title

    def _own_run(self) -> ChildRun:
        if self._child is None:
            msg = "somebody else started the run"
            raise LookupError(msg)
        return self._child

    def _go_on(self, child: ChildRun, before: list[ProcessRow]) -> None:
        """Start the run again, where it was; with the rate that it was given, whatever it was told since."""
        self._of_ended.append((self._clock.now_ms() + int(_GONE_S * 1000), before))
        self._observer.run_ended()
        self._tree.move_to(*child.start_again())
        self.rate = self.base_rate

    def _stop_for(self, role: Role, fault: Fault) -> str:
        seconds = float(fault.parameters["seconds"])
        victim = self._victim((role,), float(fault.parameters.get("pick", 0.0)))
        with self._stopped(victim, seconds):
            self._clock.wait(self._end, seconds)
        return f"{victim.title} for {seconds:g} s"

    @contextlib.contextmanager
    def _stopped(self, victim: ProcessRow, seconds: float) -> Iterator[None]:
        """Stop a process and let it go on, come what may: if this process is killed, the guard does it."""
        guard = subprocess.Popen(
            ["sh", "-c", f"sleep {seconds + _GUARD_EXTRA_S}; kill -CONT {victim.pid}"], start_new_session=True
        )
        try:
            self._tree.signal(victim, signal.SIGSTOP)
            try:
                yield
            finally:
                self._tree.let_go_on(victim)
        finally:
            guard.kill()
            guard.wait()

    def _kill_in_commit(self, fault: Fault) -> str:
        """Kill the actor of a shard at a chosen time from when its next commit is due."""
        interval_ms = self._settings.commit_interval_ms
        actor = self._victim((Role.GENERATOR,), float(fault.parameters["pick"]))
        shard = self._shard_of(actor)
        seen = self._observer.commits_ms(shard)[-1:]
        deadline_ms = self._clock.now_ms() + int(_VICTIM_S * 1000)
        while (commits := self._observer.commits_ms(shard))[-1:] == seen:
            if self._clock.now_ms() > deadline_ms or self._end.is_set():
                msg = f"shard {shard} does not commit"
                raise LookupError(msg)
            self._clock.wait(self._end, 0.002)
        aim_ms = commits[-1] + interval_ms * (1 + float(fault.parameters["offset"]))
        while aim_ms < self._clock.now_ms() + 5:
            aim_ms += interval_ms
        self._clock.wait(self._end, (aim_ms - self._clock.now_ms()) / 1000)
        self._tree.signal(actor, signal.SIGKILL)
        self._shard_hit[fault.number] = shard
        return f"shard {shard}, aimed {fault.parameters['aim']} a commit"

    def phase(self, fault: Fault, done: Injected) -> str:
        """Where in a commit a kill fell; to be asked after the recovery, when readers see all that went through; else empty."""
        if fault.number not in self._shard_hit:
            return ""
        interval_ms = self._settings.commit_interval_ms
        before = [at for at in self._observer.commits_ms(self._shard_hit[fault.number]) if at <= done.over_ms]
        return phase_of(done.over_ms - before[-1] if before else interval_ms, interval_ms)

    def outlived(self) -> str:
        """Which processes of a run that has ended should have ended too by now, and have not; empty when all have."""
        now_ms = self._clock.now_ms()
        due = [row for gone_ms, rows in self._of_ended if now_ms > gone_ms for row in rows]
        left = self._tree.still_there(due)
        return f"{', '.join(row.title for row in left)} outlived the run by {_GONE_S:.0f} s" if left else ""

    def wait_until_gone(self) -> str:
        """As :meth:`outlived`, but those that may still take their time are waited for: until all have ended, or one took too long."""
        rows = [row for _, of_run in self._of_ended for row in of_run]
        while self._tree.still_there(rows) and not self.outlived():
            if self._clock.wait(self._end, _POLL_S):
                break
        return self.outlived()

    def _shard_of(self, actor: ProcessRow) -> int:
        for said in self._observer.record("generator")["actors"]:
            if said["pid"] == actor.pid and said["partitions"]:
                return int(said["partitions"][0])
        msg = f"actor {actor.pid} owns no shard"
        raise LookupError(msg)

    def _victim(self, of: tuple[Role, ...], pick: float) -> ProcessRow:
        """One of the processes of some roles; waits for one to be there."""
        deadline_ms = self._clock.now_ms() + int(_VICTIM_S * 1000)
        while True:
            there = self.roles()
            found = [row for role in of for row in there.get(role, ())]
            if found:
                return found[min(int(pick * len(found)), len(found) - 1)]
            if self._clock.now_ms() > deadline_ms or self._end.is_set():
                msg = f"there is no process for {of[0]}"
                raise LookupError(msg)
            self._clock.wait(self._end, _POLL_S)

    def roles(self) -> dict[Role, list[ProcessRow]]:
        """The run's processes by what they do."""
        record = self._observer.record
        return roles(self._tree.rows(), self._tree.pid, record("generator"), record("job"))

    # -- commands

    def _change_rate(self, fault: Fault) -> str:
        # never the rate in force, which would be no change
        factors = [float(fault.parameters["factor"]), 1.0]
        wanted = next(f for f in factors if self.base_rate * f != self.rate) * self.base_rate
        self._tell("rate", rate=wanted)
        self.rate = wanted
        return f"{wanted:g}/s"

    def _pause(self, fault: Fault) -> str:
        seconds = float(fault.parameters["seconds"])
        with self.paused():
            self._clock.wait(self._end, seconds)
        return f"for {seconds:g} s"

    def _rescale(self, fault: Fault) -> str:
        partitions = self._partitions()
        wanted = min(int(fault.parameters["actors"]), partitions)
        now = len(self._observer.record("generator").get("actors", ()))
        if wanted == now:
            others = [actors for actors in (now - 1, now + 1) if 1 <= actors <= partitions]
            if not others:
                msg = "one partition has one actor"
                raise LookupError(msg)
            wanted = others[0]
        self._tell("scale", actors=wanted)
        return f"{now} → {wanted} actors"

    def _partitions(self) -> int:
        """How many the run has, as it says itself: nobody need have told the storm."""
        published = self._observer.record("run").get("settings", {})
        return int(published.get("partitions", self._settings.partitions))

    def _tell(self, command: str, **fields: Any) -> None:
        """Send a command and wait until the generator has it.

        Raises:
            StageFailedError: the generator does not answer, or refuses it.
            BrokerUnavailableError: the command does not reach the broker.
        """
        identity = uuid.uuid4().hex[:12]
        record = {"id": identity, "command": command, "at_ms": self._clock.now_ms(), **fields}
        failed: list[str] = []
        producer = make_producer(self._bootstrap, message_timeout_ms=int(_ANSWER_S * 1000))
        producer.produce(
            self._settings.control_topic,
            key=b"control",
            value=json.dumps(record).encode(),
            on_delivery=lambda error, _: failed.append(error.str()) if error else None,
        )
        if producer.flush(_ANSWER_S + 1) or failed:
            raise BrokerUnavailableError(problem=f"the command {command} did not reach the broker", fix="")
        deadline_ms = self._clock.now_ms() + int(_ANSWER_S * 1000)
        while (answer := self._answer_to(identity)) is None:
            if self._clock.now_ms() > deadline_ms:
                raise StageFailedError(problem=f"the generator did not answer to {command}", fix="See its status")
            self._clock.wait(threading.Event(), _POLL_S)
        if answer:
            raise StageFailedError(problem=answer, fix="")

    def _answer_to(self, identity: str) -> str | None:
        """Why a command was refused; empty when it was obeyed, None when there is no answer yet."""
        answer: str | None = self._observer.record("generator").get("answers", {}).get(identity)
        return answer
