"""The loop: a fault, the recovery from it, comparison and audit, the next fault; memory beside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ray_pipeline.chaos.inject import Injected, Injector
from ray_pipeline.chaos.observer import Observer
from ray_pipeline.chaos.plan import OF_OWN, Fault, Kind
from ray_pipeline.chaos.recovery import Recovery
from ray_pipeline.chaos.report import Audited, MemorySeries, Outcome
from ray_pipeline.clock import Clock
from ray_pipeline.errors import RayPipelineError, StageFailedError
from ray_pipeline.metrics.verdicts import Tally
from ray_pipeline.verification.audit import AuditReport

__all__ = ["Storm", "together"]

_SAMPLE_S = 0.2
_MEMORY_S = 5.0
_DEADLINE_S = 180.0
_OVERLAP_AFTER_S = 0.5
_DISAGREE_S = 15.0
_MOST_FAILURES_IN_A_ROW = 3


class Storm:
    """Carries out a plan.

    Args:
        injector: carries a fault out.
        observer: sees what the run publishes.
        audit: compares all records and windows so far with what must be there, while ratings flow.
        clock: tells the time.
        tell: is called with a line for each fault.
        end: ends the storm when set.
    """

    def __init__(
        self,
        injector: Injector,
        observer: Observer,
        audit: Callable[[], AuditReport],
        clock: Clock,
        tell: Callable[[str], None],
        end: threading.Event,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.audits: list[Audited] = []
        self.memory = MemorySeries()
        self.restarts: dict[str, int] = {}
        self.windows: Tally | None = None
        self.duration_s = 0.0
        self.aborted = ""
        self.rate = injector.base_rate
        self._injector = injector
        self._observer = observer
        self._audit = audit
        self._clock = clock
        self._tell = tell
        self._end = end
        self._began_ms = clock.now_ms()
        self._memory_ms = 0
        self._pool = ThreadPoolExecutor(2, "chaos")

    def run(self, faults: Iterable[Fault], seconds: float) -> None:
        """Inject until the time is over, the plan is at its end, the run has ended, or :attr:`end <Storm>` is set.

        Leaves the pipeline at its rate, running.
        """
        self._began_ms = self._clock.now_ms()
        try:
            self._settle("to begin with")
            groups = together(faults)
            while self._elapsed_s() < seconds and not self._end.is_set() and not self.aborted:
                group = next(groups, None)
                if group is None:
                    break
                self._one(group)
            self._injector.restore()
            self.aborted = self.aborted or self._injector.wait_until_gone()
        except RayPipelineError as error:
            self.aborted = str(error)
        finally:
            self._pool.shutdown(wait=True)
            self.restarts = self._observer.restarts()
            self.windows = self._observer.verified()
            self.duration_s = self._elapsed_s()

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Pause the pipeline, and wait until all that was sent is in windows; it goes on afterwards.

        Raises:
            StageFailedError: that was not reached in time, or the generator does not answer.
        """
        with self._injector.paused():
            deadline_ms = self._clock.now_ms() + int(_DEADLINE_S * 1000)
            while not self._observer.at_rest():
                if self._clock.now_ms() > deadline_ms:
                    raise StageFailedError(
                        problem=f"the windows did not hold all that was sent within {_DEADLINE_S:.0f} s", fix=""
                    )
                self._clock.wait(threading.Event(), _SAMPLE_S)
            yield

    # -- inside

    def _settle(self, when: str) -> None:
        recovery = Recovery(self._clock.now_ms(), self._injector.rate)
        if not self._recovered([recovery]) and not self._end.is_set():
            self.aborted = f"the pipeline was not well {when}: {recovery.wanting()}"

    def _one(self, group: list[Fault]) -> None:
        """A fault, with those that overlap it, and the recovery from them."""
        self._wait(group[0].after_s)
        futures: list[tuple[Fault, int, Future[Injected]]] = []
        for fault in group:
            if futures:
                self._wait(_OVERLAP_AFTER_S + fault.after_s)
            futures.append((fault, self._clock.now_ms(), self._pool.submit(self._injector.inject, fault)))
        injected = [(fault, at_ms, future.result()) for fault, at_ms, future in futures]
        recoveries = [
            Recovery(done.over_ms if not done.skipped else at_ms, self._injector.rate) for _, at_ms, done in injected
        ]
        well = self._recovered(recoveries)
        if self._end.is_set():
            return  # cut short: nothing can be said of it
        differs, untold, audited = self._checked() if well else ("", "", None)
        differs = differs or self._injector.outlived()
        for (fault, at_ms, done), recovery in zip(injected, recoveries, strict=True):
            failed = "" if well else recovery.wanting()
            self._note(fault, at_ms, done, recovery, done.failed or failed or differs, untold, audited)
        last = self.outcomes[-_MOST_FAILURES_IN_A_ROW:]
        if len(last) == _MOST_FAILURES_IN_A_ROW and all(outcome.failed for outcome in last):
            self.aborted = f"{_MOST_FAILURES_IN_A_ROW} failures in a row: {last[-1].failed}"
        elif well:
            self._settle("after an audit")  # which took CPU time from it: that is not to count for the next fault

    def _recovered(self, recoveries: list[Recovery]) -> bool:
        deadline_ms = self._clock.now_ms() + int(_DEADLINE_S * 1000)
        while not self._end.is_set():
            sample = self._observer.sample()
            self._look_at_memory()
            if all([recovery.observe(sample) for recovery in recoveries]):
                return True
            if sample.at_ms > deadline_ms:
                return False
            self._clock.wait(self._end, _SAMPLE_S)
        return False

    def _checked(self) -> tuple[str, str, Audited]:
        """What differs, of what it cannot be told, and the audit of all records and windows so far."""
        differs, untold = self._compare()
        report = self._audit()
        windows = report.windows
        made = Audited(report.verdict, report.records.get("found", 0), windows.get("checked", 0), report.duration_s)
        self.audits.append(made)
        # no difference of a moment: an audit takes the job's open windows for what they are, and waits for what it may still read
        found = f"the audit found {report.findings[0]}" if report.verdict == "disagreed" else ""
        unchecked = report.reason or windows.get("reason", "")
        return "; ".join(filter(None, (differs, found))), "; ".join(filter(None, (untold, unchecked))), made

    def _compare(self) -> tuple[str, str]:
        """What the job has read against what the shards' plans say, and windows against what they must hold; differences must not stay.

        Returns:
            What differs, and of what it cannot be told; both empty when all was compared and agrees.
        """
        deadline_ms = self._clock.now_ms() + int(_DISAGREE_S * 1000)
        while True:
            read, windows = self._observer.surpluses(), self._observer.verified()
            if not any(n is None or n for n in read.values()) and not windows.wrong:
                return "", ""
            if self._clock.now_ms() > deadline_ms or self._end.is_set():
                break
            self._clock.wait(self._end, _SAMPLE_S)
        found = [f"the job has read {n:+} of partition {p}" for p, n in sorted(read.items()) if n]
        found += [f"{windows.wrong} windows are wrong: {windows.first_wrong}"] if windows.wrong else []
        return ", ".join(found), ", ".join(f"partition {p}" for p, n in sorted(read.items()) if n is None)

    def _note(
        self,
        fault: Fault,
        at_ms: int,
        done: Injected,
        recovery: Recovery,
        failed: str,
        untold: str,
        audited: Audited | None,
    ) -> None:
        outcome = Outcome(
            number=fault.number,
            kind=fault.kind.value,
            overlapping=fault.overlapping,
            begun_s=round((at_ms - self._began_ms) / 1000, 2),
            detail=done.detail,
            phase=self._injector.phase(fault, done),
            skipped=done.skipped,
            at_rate_s=None if done.skipped else recovery.seconds(recovery.at_rate),
            fresh_s=None if done.skipped else recovery.seconds(recovery.fresh),
            api_s=None if done.skipped else recovery.seconds(recovery.api),
            failed=failed,
            oracle_s=None if done.skipped else recovery.seconds(recovery.oracle),
            untold=untold,
            audit=audited,
        )
        self.outcomes.append(outcome)
        self._tell(_line(outcome))

    def _look_at_memory(self) -> None:
        """Also finds out that the run has ended."""
        now_ms = self._clock.now_ms()
        if now_ms - self._memory_ms < _MEMORY_S * 1000:
            return
        self._memory_ms = now_ms
        found = self._injector.roles()
        self.memory.add(
            self._elapsed_s(), {role.value: sum(row.memory_bytes for row in rows) for role, rows in found.items()}
        )

    def _elapsed_s(self) -> float:
        return (self._clock.now_ms() - self._began_ms) / 1000

    def _wait(self, seconds: float) -> None:
        self._clock.wait(self._end, seconds)


def together(faults: Iterable[Fault]) -> Iterator[list[Fault]]:
    """Faults with those that overlap them, two at most: two processes that stand still at once are one fault too many to judge."""
    group: list[Fault] = []
    for fault in faults:
        if group and (not fault.overlapping or len(group) == 2 or _alike(group[0], fault)):
            yield group
            group = []
        group.append(fault)
    if group:
        yield group


def _alike(first: Fault, second: Fault) -> bool:
    """Whether the one undoes or repeats the other, as the end of the run does with all that was done to it."""
    commands = (Kind.PAUSE, Kind.RATE, Kind.RESCALE)
    kinds = {first.kind, second.kind}
    return len(kinds) == 1 or not kinds.isdisjoint(OF_OWN) or kinds <= set(commands)


def _line(outcome: Outcome) -> str:
    hit = f", hit {outcome.phase}" if outcome.phase else ""
    what = f"{outcome.number:>4} {outcome.kind:<15} {outcome.detail}{hit}"
    if outcome.skipped:
        return f"{what}skipped: {outcome.skipped}"
    times = ", ".join(
        f"{name} {seconds:.1f} s"
        for name, seconds in (
            ("rate", outcome.at_rate_s),
            ("windows", outcome.fresh_s),
            ("API", outcome.api_s),
            ("oracle", outcome.oracle_s),
        )
        if seconds is not None
    )
    untold = f"  could not be told: {outcome.untold}" if outcome.untold else ""
    return f"{what}: {times}{untold}" + (f"  FAILED: {outcome.failed}" if outcome.failed else "")
