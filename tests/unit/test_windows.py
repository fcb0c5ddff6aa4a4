"""Collector, ledger and reference: windows to the last count."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.config import load_settings
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.windows.collector import Collector, Groups
from ray_pipeline.windows.ledger import CountLedger
from ray_pipeline.windows.reference import Ratings, reference
from ray_pipeline.windows.spec import WindowSpec, iso_ms, window_specs

CATALOGUE = load_catalogue(load_settings(movies=50))
SPECS = (WindowSpec(60_000, 60_000), WindowSpec(300_000, 60_000))
GENRES = {int(m): CATALOGUE.genres[n] for n, m in enumerate(CATALOGUE.movie_ids)}


def groups_of(ratings: list[tuple[int, int, int]]) -> Groups:
    """(movie, half stars, time) → what the Spark job would say, in the plainest way."""
    cells: dict[tuple[int, int, int], list[int]] = defaultdict(lambda: [0] * 10)
    for movie, half, at in ratings:
        for kind, spec in enumerate(SPECS):
            for end in range(spec.slide_ms, 10_000_000, spec.slide_ms):
                if end - spec.size_ms <= at < end:
                    cells[kind, end, movie][half - 1] += 1
    rows = sorted(cells)
    stars = np.array([cells[row] for row in rows], np.int64).reshape(-1, 10)
    nothing = np.full(len(rows), -1, np.int64)
    columns = np.array(rows, np.int64).reshape(-1, 3)
    return Groups(columns[:, 0], columns[:, 1], columns[:, 2], stars[:, 0::2] | stars[:, 1::2] << 32, *[nothing] * 3)


some_ratings = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 10), st.integers(0, 900_000)), min_size=1, max_size=60
)


@given(some_ratings, st.integers(0, 60))
def test_the_collector_agrees_with_the_reference(ratings: list[tuple[int, int, int]], cut: int) -> None:
    collector = Collector(CATALOGUE, SPECS, top_n=5)
    collector.apply(groups_of(ratings[:cut]))
    changed = collector.apply(groups_of(ratings))
    assert collector.apply(groups_of(ratings)) == changed  # absolute: again changes nothing
    batch = Ratings(*(np.array(column) for column in zip(*[(m, h / 2, t) for m, h, t in ratings], strict=True)))
    for kind, spec in enumerate(SPECS):
        truth = reference([batch], spec.size_ms, spec.slide_ms, 0).windows
        assert sorted(end - spec.size_ms for k, end in changed if k == kind) == sorted(truth)
        for start, window in truth.items():
            records = dict(collector.records((kind, start + spec.size_ms), 3, 4))
            key = f"{spec.name}|{iso_ms(start)}"
            total = records[f"{key}|total"]
            assert list(total)[:5] == ["window_start", "window_end", "window_type", "count", "avg_rating"]
            assert (total["count"], total["avg_rating"]) == (window.count, window.avg_rating)
            assert (total["p50"], total["p95"]) == (window.percentile(0.5), window.percentile(0.95))
            assert total["histogram"] == window.histogram()
            top = [(m["movieId"], m["count"], m["avg_rating"]) for m in records[f"{key}|topn"]["movies"]]
            assert top == window.top(5)
            by_genre = [(g["genre"], g["count"], g["avg_rating"]) for g in records[f"{key}|genres"]["genres"]]
            assert by_genre == window.by_genre(GENRES)


def test_closed_windows_are_forgotten() -> None:
    collector = Collector(CATALOGUE, SPECS, top_n=5)
    collector.apply(groups_of([(1, 5, 30_000), (1, 5, 200_000)]))
    assert collector.close(60_000) == 2  # the tumbling one and the oldest sliding one, both ending at 60 s
    assert (0, 60_000) not in collector.open and (0, 240_000) in collector.open


def test_names_and_alignment_of_windows() -> None:
    assert [spec.name for spec in SPECS] == ["tumbling_1min", "sliding_5min_1min"]
    assert [spec.name for spec in window_specs(load_settings(tumbling_s=90, sliding_s=7200, slide_s=30))] == [
        "tumbling_90s",
        "sliding_2h_30s",
    ]
    assert iso_ms(1_700_000_000_001) == "2023-11-14T22:13:20.001Z"


def test_the_reference_drops_by_the_watermark_of_the_batch_before() -> None:
    def batch(*times: int) -> Ratings:
        return Ratings(np.ones(len(times), np.int64), np.full(len(times), 3.0), np.array(times))

    found = reference([batch(1_000), batch(200_000), batch(2_000), batch(3_000)], 60_000, 60_000, 10_000)
    assert found.late == 1  # 2,000 came in before the watermark of 190,000 counted, 3,000 after
    assert found.windows[0].count == 2


# -- ledger


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 50)), max_size=30), st.integers(0, 30))
def test_the_ledger_counts_through_closes_and_a_restart(added: list[tuple[int, int]], restart_at: int) -> None:
    ledger, state, total, watermark = CountLedger(), {}, 0, 0
    for step, (end, count) in enumerate(added):
        if step == restart_at:
            fresh = CountLedger()
            fresh.restore(ledger.as_record(), dict(state))
            ledger = fresh
        end = max(end, watermark + 1)
        state[end] = state.get(end, 0) + count
        total += count
        ledger.set(end, state[end])
        watermark = max(watermark, end - 3)
        ledger.close(watermark)
        state = {e: n for e, n in state.items() if e > watermark}
        assert ledger.counted == total


def test_a_batch_that_was_published_but_not_committed_is_not_counted_twice() -> None:
    ledger = CountLedger()
    ledger.set(60, 10)
    record = ledger.as_record()
    ledger.restore(record, {60: 7})  # the state went back to before the batch
    assert ledger.counted == 7
    ledger.set(60, 10)
    assert ledger.counted == 10


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
def test_percentiles_are_ratings(share: float) -> None:
    from ray_pipeline.windows.collector import percentile

    histogram = np.array([0, 3, 0, 0, 0, 5, 0, 1, 0, 1])
    stars = np.repeat(np.arange(1, 11) / 2, histogram)
    assert percentile(histogram, share) == stars[max(1, int(np.ceil(share * 10))) - 1]
