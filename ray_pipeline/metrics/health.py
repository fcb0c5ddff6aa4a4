"""Whether the pipeline is well, and if not, why. Every line compares what one stage says with what another says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray_pipeline.metrics.verdicts import Tally

__all__ = ["Evidence", "Health", "assess"]

_STALE_MS = 10_000
_DEAD_MS = 60_000
_BEHIND_S = 5.0
_LAG_S = 15.0
_DISAGREE_MS = 10_000
_ORACLE_BATCHES = 100


@dataclass(frozen=True, slots=True)
class Evidence:
    """What health is judged from. Times are wall-clock epoch milliseconds.

    Attributes:
        kafka_connected: whether a broker answered lately.
        generator: record ``generator``; empty before the first.
        job: record ``job``; empty before the first.
        surplus: records that the job has read of a partition beyond what it must have, below 0 = too few; agreeing ones left out.
        disagreeing_since_ms: since when there are such partitions; None = there are none.
        delivered_rate: ratings per second.
        now_ms: the time.
        oracle: record ``oracle``; empty before the first.
        windows: the verdicts on all windows.
        scores: how the scoreboard stands; empty before it has said so.
        alone_since_ms: since when the generator goes on though the job has stopped; None = it does not.
    """

    kafka_connected: bool
    generator: dict[str, Any]
    job: dict[str, Any]
    surplus: dict[int, int]
    disagreeing_since_ms: int | None
    delivered_rate: float
    now_ms: int
    oracle: dict[str, Any]
    windows: Tally
    scores: dict[str, Any]
    alone_since_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """The verdict.

    Attributes:
        status: ``starting``, ``healthy``, ``degraded``, ``unhealthy`` or ``stopped``.
        reasons: why; the worst first; empty when healthy.
        stale_since_ms: since when the windows have not been refreshed; None when they are fresh.
    """

    status: str
    reasons: tuple[str, ...]
    stale_since_ms: int | None


def assess(evidence: Evidence) -> Health:
    """Judge."""
    unhealthy: list[str] = []
    degraded: list[str] = []
    generator, job, now_ms = evidence.generator, evidence.job, evidence.now_ms
    stale_since_ms = None
    if not evidence.kafka_connected:
        unhealthy.append("no Kafka broker answers")
    if generator.get("state") == "failed":
        unhealthy.append("the generator failed")
    if job.get("state") == "failed":
        unhealthy.append(f"the Spark job failed: {job.get('reason') or 'no reason given'}")
    if evidence.disagreeing_since_ms is not None and now_ms - evidence.disagreeing_since_ms > _DISAGREE_MS:
        unhealthy.extend(_differences(evidence.surplus))
    if evidence.windows.wrong:
        more = f" (and {evidence.windows.wrong - 1:,} more)" if evidence.windows.wrong > 1 else ""
        unhealthy.append(f"{evidence.windows.first_wrong}{more}")
    job_stopped = job.get("state") == "stopped"
    if job_stopped and evidence.alone_since_ms is not None and now_ms - evidence.alone_since_ms > _STALE_MS:
        stale_since_ms = int(job["updated_ms"])
        heard = now_ms - int(generator["updated_ms"]) <= _STALE_MS
        degraded.append("the Spark job has stopped" + (", and the generator goes on" if heard else ""))
    if job and not job_stopped:
        age_ms = now_ms - int(job["updated_ms"])
        if age_ms > _STALE_MS:
            stale_since_ms = int(job["updated_ms"])
            (unhealthy if age_ms > _DEAD_MS else degraded).append(
                f"the Spark job has said nothing for {age_ms / 1000:.0f} s"
            )
        wanted, alive = int(job.get("executors_wanted", 0)), int(job.get("executors", 0))
        if alive < wanted and int(job.get("batch", -1)) >= 0:
            degraded.append(f"{alive} of {wanted} Spark executors are alive")
        rate = max(evidence.delivered_rate, 1.0)
        # what came since the last micro-batch is unread until the next one has ended
        lag_s = _LAG_S + 2 * int(job.get("trigger_interval_ms", 0)) / 1000
        if int(job.get("lag", 0)) / rate > lag_s:
            degraded.append(f"the Spark job is {int(job['lag']):,} ratings behind")
        if job.get("state") == "waiting":
            degraded.append(f"the windows wait: {job.get('reason')}")
        elif job.get("reason") and job.get("state") != "failed":
            degraded.append(f"the Spark job has trouble: {job['reason']}")
        degraded.extend(_oracle(evidence, now_ms))
        if evidence.scores.get("state") == "failed":
            degraded.append(
                f"learners are not scored: the scoreboard failed: {evidence.scores.get('reason') or 'no reason given'}"
            )
    if generator and generator.get("state") not in ("stopped", "failed"):
        age_ms = now_ms - int(generator["updated_ms"])
        if age_ms > _STALE_MS:
            degraded.append(f"the generator has said nothing for {age_ms / 1000:.0f} s")
        if float(generator.get("behind_s", 0)) > _BEHIND_S and generator.get("state") != "backfilling":
            degraded.append(f"the generator is behind by {float(generator['behind_s']):.1f} s")
        dead = [str(actor["actor"]) for actor in generator.get("actors", ()) if not actor["alive"]]
        if dead:
            degraded.append(f"generator actor {', '.join(dead)} is down")
    reasons = (*unhealthy, *degraded)
    if unhealthy:
        return Health("unhealthy", reasons, stale_since_ms)
    if job_stopped and generator.get("state", "stopped") == "stopped":
        who = "generator and Spark job have stopped" if generator else "the Spark job has stopped"
        return Health("stopped", (who, *reasons), None)
    if not job or int(job.get("batch", -1)) < 0:
        return Health("starting", ("no data yet", *reasons), stale_since_ms)
    if job_stopped and generator.get("state") == "starting":
        return Health("starting", ("the Spark job has not started again yet", *reasons), stale_since_ms)
    return Health("degraded" if degraded else "healthy", reasons, stale_since_ms)


def _oracle(evidence: Evidence, now_ms: int) -> list[str]:
    """Why the windows are not, or not up to date, compared with what they must hold."""
    oracle, job, windows = evidence.oracle, evidence.job, evidence.windows
    if int(job.get("batch", -1)) < 0:
        return []
    if not oracle:
        return ["the windows are not verified: no oracle has reported"]
    if oracle.get("state") == "failed":
        return [f"the windows are not verified: the oracle failed: {oracle.get('reason') or 'no reason given'}"]
    age_ms = now_ms - int(oracle["updated_ms"])
    if oracle.get("state") != "stopped" and age_ms > _STALE_MS:
        return [f"the oracle has said nothing for {age_ms / 1000:.0f} s"]
    behind = int(job["batch"]) - int(oracle["batch"])
    if oracle.get("state") == "stopped":
        return ["the windows are no longer verified: the oracle has stopped"] if behind > 0 else []
    found = [f"the oracle is {behind:,} micro-batches behind"] if behind > _ORACLE_BATCHES else []
    if windows.overdue:
        more = f" (and {windows.overdue - 1:,} more)" if windows.overdue > 1 else ""
        found.append(f"{windows.first_overdue}{more}")
    return found


def _differences(surplus: dict[int, int]) -> list[str]:
    return [
        f"partition {partition} holds {difference:,} records that no shard sent"
        if difference > 0
        else f"partition {partition}: {-difference:,} ratings that were sent have not been read"
        for partition, difference in sorted(surplus.items())
    ]
