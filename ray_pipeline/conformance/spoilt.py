"""Checks of what is broken on purpose: texts, repeats, event times that are not those that records are due at."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Counted, Distance, Estimate, Measure, Unchecked
from ray_pipeline.conformance.world import World
from ray_pipeline.events import Fault
from ray_pipeline.model.faults import Fates, Faults, make_faults

__all__ = [
    "behind",
    "clock",
    "delays_ms",
    "future",
    "future_share",
    "lateness",
    "lost",
    "repeat_distance",
    "repeats",
    "silence",
    "text_share",
]

_SIMULATED = 200_000
_NO_SHARD = 2**31 - 1
_BINS = 12
_EXPECTED_LEAST = 20.0
_FEWEST = 200
_ALIKE_MOST = 100


def text_share(fault: Fault, setting: str) -> Callable[[Evidence], Measure]:
    """A check of the share of records whose text is broken in one way."""

    def measure(evidence: Evidence) -> Measure:
        count = int(evidence.raw.texts[fault])
        return _share(count, evidence.records, getattr(evidence.declared.settings, setting))

    return measure


def repeats(evidence: Evidence) -> Measure:
    """Share of records that repeat an earlier one of their partition."""
    return _share(int((evidence.repeats > 0).sum()), evidence.records, evidence.declared.settings.duplicate_share)


def repeat_distance(evidence: Evidence) -> Measure:
    """How many records back the repeated one lies, in the mean."""
    fates = _simulated(evidence.declared.settings)
    if fates is None or not (fates.faults == Fault.DUPLICATE).any():
        return _nothing(int((evidence.repeats > 0).sum()), "no records are declared to be repeated")
    raw = evidence.raw
    moments = len(np.unique(raw.timestamps_ms * evidence.declared.settings.partitions + raw.partition))
    if len(raw) > _ALIKE_MOST * moments:
        return Unchecked("so many ratings of a millisecond that those before a repeat may be alike")
    back = (np.arange(len(fates.sources)) - fates.sources)[fates.faults == Fault.DUPLICATE]
    found = evidence.repeats[evidence.repeats > 0]
    if len(found) < _FEWEST:
        return Unchecked(f"fewer than {_FEWEST} repeats")
    error = float(back.std()) * math.sqrt(1 / len(found) + 1 / len(back)) + 1e-9
    return Estimate(float(found.mean()), error, float(back.mean()))


def behind(evidence: Evidence) -> Measure:
    """Share of records whose event time lies before the time at which they are due."""
    settings = evidence.declared.settings
    return _share(int((_off(evidence) < 0).sum()), evidence.records, settings.late_share + settings.disorder_share)


def lateness(evidence: Evidence) -> Measure:
    """By how much, against the declared laws of late records and of those out of order together."""
    found, declared = delays_ms(evidence)
    if not len(declared):
        return _nothing(len(found), "no records are declared to be late or out of order")
    if len(found) < _FEWEST:
        return Unchecked(f"fewer than {_FEWEST} records are late or out of order")
    # the last of them is the greatest that may be: nothing is expected beyond it
    edges = np.unique(np.quantile(declared, np.linspace(0, 1, _BINS + 1)[1:]))
    expected = np.bincount(np.searchsorted(edges, declared), minlength=len(edges) + 1) * (len(found) / len(declared))
    counts = np.bincount(np.searchsorted(edges, found), minlength=len(edges) + 1)
    filled = expected >= _EXPECTED_LEAST
    grown = 1.0 + len(found) / len(declared)
    statistic = float(((counts - expected)[filled] ** 2 / (expected[filled] * grown)).sum())
    value = float(np.abs(counts - expected).sum() / 2 / len(found))
    return Distance(value, math.inf if counts[-1] > len(found) / 100 else statistic, max(1, int(filled.sum()) - 1))


def delays_ms(evidence: Evidence) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """By how much event times lie before the time at which records are due, of those that do: found, and as is declared."""
    off, fates = _off(evidence), _simulated(evidence.declared.settings)
    if fates is None:
        return -off[off < 0], np.empty(0, np.int64)
    return -off[off < 0], (fates.due_ms - fates.times_ms)[_moved(fates)]


def future_share(evidence: Evidence) -> Measure:
    """Share of records whose event time lies behind the time at which they are due."""
    return _share(int((_off(evidence) > 0).sum()), evidence.records, evidence.declared.settings.future_share)


def future(evidence: Evidence) -> Measure:
    """By how much."""
    settings, ahead = evidence.declared.settings, _off(evidence)
    ahead = ahead[ahead > 0]
    if not settings.future_share:
        return _nothing(len(ahead), "no records are declared to be ahead of their time")
    if not len(ahead):
        return Unchecked("no records are ahead of their time")
    return Counted.exactly(_commonest(ahead) / 1000, round(settings.future_s * 1000) / 1000)


def clock(evidence: Evidence) -> Measure:
    """By how much the clocks of shards are wrong, summed over them."""
    declared = (make_faults(evidence.declared.settings, p) for p in range(evidence.declared.settings.partitions))
    skews_ms = [0 if faults is None else faults.skew_ms for faults in declared]
    found_ms = [abs(ms) for ms in evidence.skews_ms]
    return Counted.exactly(sum(found_ms) / 1000, sum(abs(ms) for ms in skews_ms) / 1000)


def silence(evidence: Evidence) -> Measure:
    """Share of the ratings that are due while their partition is silent."""
    return Counted.exactly(_held(evidence, evidence.raw.source), _held(evidence, evidence.declared))


def lost(evidence: Evidence) -> Measure:
    """Lost ratings that the answer key of those who sent the others has, for each that was sent."""
    settings, count = evidence.declared.settings, 0
    for partition, sent in evidence.sent.items():
        faults = make_faults(evidence.raw.source.settings, partition)
        count += 0 if faults is None else len(faults.dropped(0, sent))
    return _share(count, sum(evidence.sent.values()), settings.drop_share)


# -- inside


def _nothing(count: int, reason: str) -> Measure:
    """Of what is not declared there is no law to judge: it conforms where there is none of it."""
    return Unchecked(reason) if count else Counted.exactly(0.0, 0.0)


def _share(count: int, total: int, declared: float) -> Measure:
    if not total:
        return Unchecked("there are no records")
    if not declared:
        return Counted.exactly(count / total, 0.0)
    return Estimate(count / total, math.sqrt(declared * (1 - declared) / total), declared)


def _off(evidence: Evidence) -> npt.NDArray[np.int64]:
    """Event time less due time of the records that repeat none, without what their shard's clock is wrong by, milliseconds."""
    own = evidence.repeats == 0
    skews_ms = np.array(evidence.skews_ms, np.int64)[evidence.raw.partition]
    return np.asarray((evidence.shifts_ms - skews_ms)[own], np.int64)


def _moved(fates: Fates) -> npt.NDArray[np.bool_]:
    return np.asarray((fates.faults == Fault.LATE) | (fates.faults == Fault.OUT_OF_ORDER), np.bool_)


def _simulated(settings: Settings) -> Fates | None:
    """The declared laws, as a shard shows them that there is not."""
    faults: Faults | None = make_faults(settings, _NO_SHARD)
    far_ms = 10**13
    return (
        None if faults is None else faults.fates(0, _SIMULATED, lambda first, count: np.full(count, far_ms, np.int64))
    )


def _commonest(values: npt.NDArray[np.int64]) -> int:
    distinct, counts = np.unique(values, return_counts=True)
    return int(distinct[counts.argmax()])


def _held(evidence: Evidence, world: World) -> float:
    held = total = 0
    for partition, sent in evidence.sent.items():
        due_ms = evidence.declared.schedules[partition].due_ms(0, sent)
        faults = make_faults(world.settings, partition)
        held += 0 if faults is None else int((faults.sent_ms(due_ms) > due_ms).sum())
        total += sent
    return held / max(1, total)
