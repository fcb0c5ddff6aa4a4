"""Random arrivals: a Poisson process, of which any part can be had alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.delivery.interface import Epoch
from ray_pipeline.generator import arrivals as arrivals_module
from ray_pipeline.generator.arrivals import PoissonArrivals, RegularArrivals, poisson_arrivals
from ray_pipeline.generator.plan import RatePlan, ShardSchedule, allocate

START_MS = 1_700_000_000_000
COUNT = 1_000_000


def test_gaps_are_exponential_and_independent() -> None:
    points = PoissonArrivals(42, 0).points(0, COUNT)
    gaps = np.diff(points, prepend=0.0)
    assert (gaps >= 0).all() and points[-1] == pytest.approx(COUNT, rel=4 / math.sqrt(COUNT))
    ascending = np.sort(gaps)
    distance = np.abs(1 - np.exp(-ascending) - (np.arange(COUNT) + 0.5) / COUNT).max()
    assert distance < 1.63 / math.sqrt(COUNT)  # Kolmogorov-Smirnov at 1 %
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / math.sqrt(COUNT)


@pytest.mark.parametrize("span", [0.5, 10.0, 1_000.0, 5_000.0])  # within a block, around one, over several
def test_counts_scatter_as_much_as_they_are_many(span: float) -> None:
    points = PoissonArrivals(7, 3).points(0, COUNT if span < 1_000 else 10 * COUNT)
    counts = np.bincount((points / span).astype(np.int64))[:-1]
    dispersion = counts.var() / counts.mean()
    assert dispersion == pytest.approx(1.0, abs=4 * math.sqrt(2 / len(counts)))


def test_shards_and_seeds_are_independent() -> None:
    gaps = [np.diff(PoissonArrivals(seed, p).points(0, 100_000)) for seed, p in ((1, 0), (1, 1), (2, 0))]
    for one, other in ((0, 1), (0, 2)):
        assert abs(np.corrcoef(gaps[one], gaps[other])[0, 1]) < 4 / math.sqrt(100_000)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 50_000), st.integers(0, 5_000), st.data())
def test_any_part_can_be_had_alone_and_counting_inverts_it(first: int, count: int, data: st.DataObject) -> None:
    arrivals = PoissonArrivals(42, 1)
    points = arrivals.points(first, count)
    at = data.draw(st.integers(0, count))
    assert (np.concatenate([arrivals.points(first, at), arrivals.points(first + at, count - at)]) == points).all()
    assert (arrivals.points_at(np.arange(first, first + count)) == points).all()
    if at < count:
        assert arrivals.point(first + at) == points[at]
        assert arrivals.count_upto(float(points[at])) == first + at + 1
        assert arrivals.count_upto(float(np.nextafter(points[at], 0))) == first + at


def test_a_process_that_is_followed_for_long_is_seldom_copied_and_is_the_same() -> None:
    followed, at_once = arrivals_module._Blocks(3, 1), arrivals_module._Blocks(3, 1)
    copies, blocks = [followed._starts], 200_000
    for block in range(0, blocks, 100):
        begins = followed._begins(block)
        if begins is not copies[-1]:
            copies.append(begins)
    assert len(copies) < 12
    assert (begins[:blocks] == at_once._begins(blocks)[: len(begins[:blocks])]).all()


@pytest.mark.parametrize("arrivals", [RegularArrivals(0.3), PoissonArrivals(5, 2)])
def test_nothing_has_come_before_the_first_and_the_far_future_is_near(arrivals: RegularArrivals) -> None:
    assert arrivals.count_upto(-5.0) == 0 == arrivals.count_upto(0.0)
    assert arrivals.count_upto(arrivals.point(0)) == 1
    assert arrivals.count_upto(1e8) == pytest.approx(1e8, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=5),
    st.lists(st.integers(0, 3_000), min_size=5, max_size=5),
    st.integers(0, 20_000),
)
def test_exactly_the_ratings_asked_for_are_shared_out_and_those_due_first(
    raw: list[float], starts: list[int], total: int
) -> None:
    plan = RatePlan([Epoch(START_MS, 100.0)])
    schedules = [ShardSchedule(plan, s / sum(raw), 0.5, poisson_arrivals(3, p)) for p, s in enumerate(raw)]
    begins = starts[: len(raw)]
    ends = allocate(schedules, begins, total)
    assert sum(ends) - sum(begins) == total
    grown = [p for p, (end, begin) in enumerate(zip(ends, begins, strict=True)) if end > begin]
    if grown:
        last = max(float(schedules[p].due_ms(ends[p] - 1, 1)[0]) for p in grown)
        assert last <= min(float(s.due_ms(end, 1)[0]) for s, end in zip(schedules, ends, strict=True))
