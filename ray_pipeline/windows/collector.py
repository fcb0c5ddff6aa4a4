"""From the job's changed groups to the records of topic ``metrics``. Pure: NumPy, no Spark, no Kafka.

Holds the panes, and every open window as a sum of them, as dense counts by movie; the job's groups are absolute, so applying one twice
changes nothing. Which window a late rating is still counted in is decided here, by Spark's own rule: a micro-batch drops by the
watermark of the batch before, and evicts by its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.windows.spec import Panes, WindowSpec, iso_ms

__all__ = ["Collector", "Groups", "PartitionTotals"]

_STARS = np.arange(1, 11) / 2.0
_HALVES = np.arange(1, 11)
_LOW = np.int64(0xFFFF_FFFF)


@dataclass(frozen=True, slots=True)
class Groups:
    """Changed groups of a micro-batch, in columns; see ``job.RESULT_COLUMNS``.

    Attributes:
        pane_ms: shape (n,), start of the pane, epoch milliseconds; -1 for totals of a partition.
        id: shape (n,), movie id, or partition.
        packed: shape (n, 5), int64: two 32-bit counts each.
        max_offset: shape (n,), last offset read, -1 where there is none.
        max_rejected: shape (n,), last offset rejected, -1 where there is none.
        max_event_ms: shape (n,), latest event time, -1 where there is none.
    """

    pane_ms: npt.NDArray[np.int64]
    id: npt.NDArray[np.int64]
    packed: npt.NDArray[np.int64]
    max_offset: npt.NDArray[np.int64]
    max_rejected: npt.NDArray[np.int64]
    max_event_ms: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PartitionTotals:
    """What was read of a Kafka partition since its first record."""

    records: int
    rejected: int
    max_offset: int
    max_rejected: int
    max_event_ms: int

    def as_record(self) -> dict[str, int]:
        """For topic ``metrics.progress``."""
        return {
            "records": self.records,
            "valid": self.records - self.rejected,
            "rejected": self.rejected,
            "next_offset": self.max_offset + 1,
            "max_event_ms": self.max_event_ms,
        }


@dataclass
class _Pane:
    """What the job said last of a pane."""

    by_star: npt.NDArray[np.int32]  # (movies, 10)
    unknown: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)


@dataclass
class _Window:
    """One open window: sums over its panes."""

    count: npt.NDArray[np.int64]  # (movies,)
    half_sum: npt.NDArray[np.int64]  # (movies,)
    histogram: npt.NDArray[np.int64]  # (10,)
    genre_count: npt.NDArray[np.int64]
    genre_half_sum: npt.NDArray[np.int64]
    unknown: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)  # movies that the catalogue does not have


class Collector:
    """Keeps the open windows and tells what changed.

    Args:
        catalogue: movies and genres.
        specs: the window kinds.
        top_n: movies in a ``topn`` record.
        delay_ms: how long a window waits for late ratings, milliseconds.
    """

    def __init__(self, catalogue: Catalogue, specs: tuple[WindowSpec, ...], top_n: int, delay_ms: int) -> None:
        self.totals: dict[int, PartitionTotals] = {}
        self.watermark_ms = 0
        self._catalogue = catalogue
        self._genres = catalogue.genre_matrix.astype(np.int64)
        self._specs = specs
        self._in_panes = Panes(specs)
        self._top_n = top_n
        self._delay_ms = delay_ms
        self._panes: dict[int, _Pane] = {}
        self._windows: dict[tuple[int, int], _Window] = {}

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def open(self) -> list[tuple[int, int]]:
        """The open windows, as (kind, end in epoch milliseconds)."""
        return sorted(self._windows)

    def count_of(self, window: tuple[int, int]) -> int:
        """Ratings in an open window."""
        return int(self._windows[window].histogram.sum())

    def restore(self, groups: Groups, watermark_ms: int) -> None:
        """Take in the whole state, as it was after a micro-batch.

        Args:
            groups: all groups of the state.
            watermark_ms: the watermark of that micro-batch, epoch milliseconds.
        """
        self.watermark_ms = watermark_ms
        self.apply(groups)

    def apply(self, groups: Groups) -> list[tuple[int, int]]:
        """Take the changed groups of a micro-batch in; :meth:`close` ends it.

        Returns:
            The windows they belong to, as (kind, end in epoch milliseconds), in order.
        """
        for row in np.flatnonzero(groups.pane_ms < 0).tolist():
            self.totals[int(groups.id[row])] = PartitionTotals(
                int(groups.packed[row, 0]),
                int(groups.packed[row, 1]),
                int(groups.max_offset[row]),
                int(groups.max_rejected[row]),
                int(groups.max_event_ms[row]),
            )
        rows = np.flatnonzero(groups.pane_ms >= 0)
        rows = rows[np.argsort(groups.pane_ms[rows], kind="stable")]
        panes, firsts = np.unique(groups.pane_ms[rows], return_index=True)
        changed: set[tuple[int, int]] = set()
        for pane_ms, part in zip(panes.tolist(), np.split(rows, firsts)[1:], strict=True):
            # too late for a window that the watermark of the batch before has passed
            windows = [w for w in self._in_panes.windows_of(pane_ms) if w[1] > self.watermark_ms]
            self._merge(pane_ms, windows, groups.id[part], unpack(groups.packed[part]))
            changed.update(windows)
        return sorted(changed)

    def next_watermark_ms(self) -> int:
        """The watermark of the next micro-batch: the newest event time so far, less the delay; it never goes back."""
        newest_ms = max((t.max_event_ms for t in self.totals.values()), default=0)
        return max(self.watermark_ms, newest_ms - self._delay_ms)

    def records(self, window: tuple[int, int], batch: int, now_ms: int) -> list[tuple[str, dict[str, Any]]]:
        """The records of one window, each with its key: ``total``, ``topn`` and ``genres``."""
        kind, end_ms = window
        spec, state = self._specs[kind], self._windows[window]
        count = int(state.histogram.sum())
        head = {
            "window_start": iso_ms(end_ms - spec.size_ms),
            "window_end": iso_ms(end_ms),
            "window_type": spec.name,
            "count": count,
            "avg_rating": _mean(int(state.histogram @ _HALVES), count),
        }
        last = {"batch": batch, "updated_ms": now_ms}
        views: dict[str, dict[str, Any]] = {
            "total": {
                "p50": percentile(state.histogram, 0.50),
                "p95": percentile(state.histogram, 0.95),
                "histogram": state.histogram.tolist(),
            },
            "topn": {"movies": self._top(state)},
            "genres": {"genres": self._by_genre(state)},
        }
        return [
            (f"{spec.name}|{head['window_start']}|{name}", {**head, "kind": name, **view, **last})
            for name, view in views.items()
        ]

    def close(self, watermark_ms: int) -> int:
        """End a micro-batch: forget the windows that ended at or before its watermark; returns how many."""
        self.watermark_ms = watermark_ms
        over = [key for key in self._windows if key[1] <= watermark_ms]
        for key in over:
            del self._windows[key]
        for pane_ms in list(self._panes):
            if all(end_ms <= watermark_ms for _, end_ms in self._in_panes.windows_of(pane_ms)):
                del self._panes[pane_ms]
        return len(over)

    # -- inside

    def _empty(self) -> _Window:
        movies, genres = self._genres.shape
        return _Window(
            np.zeros(movies, np.int64),
            np.zeros(movies, np.int64),
            np.zeros(10, np.int64),
            np.zeros(genres, np.int64),
            np.zeros(genres, np.int64),
        )

    def _merge(
        self,
        pane_ms: int,
        windows: list[tuple[int, int]],
        ids: npt.NDArray[np.int64],
        stars: npt.NDArray[np.int64],
    ) -> None:
        """What is new in a pane, into each of some windows."""
        pane = self._panes.get(pane_ms)
        if pane is None:
            pane = self._panes[pane_ms] = _Pane(np.zeros((len(self._genres), 10), np.int32))
        position = self._catalogue.index_of(ids)
        known = position >= 0
        at, new = position[known], stars[known]
        added = new - pane.by_star[at]
        pane.by_star[at] = new
        count, half_sum, histogram = added.sum(axis=1), added @ _HALVES, added.sum(axis=0)
        genre_count, genre_half_sum = count @ self._genres[at], half_sum @ self._genres[at]
        nothing = np.zeros(10, np.int64)
        others: dict[int, npt.NDArray[np.int64]] = {}
        for movie_id, row in zip(ids[~known].tolist(), stars[~known], strict=True):
            others[movie_id] = row - pane.unknown.get(movie_id, nothing)
            pane.unknown[movie_id] = row
        for key in windows:
            window = self._windows.get(key)
            if window is None:
                window = self._windows[key] = self._empty()
            window.count[at] += count
            window.half_sum[at] += half_sum
            window.histogram += histogram
            window.genre_count += genre_count
            window.genre_half_sum += genre_half_sum
            for movie_id, row in others.items():
                window.histogram += row
                window.unknown[movie_id] = window.unknown.get(movie_id, nothing) + row

    def _top(self, state: _Window) -> list[dict[str, Any]]:
        count = state.count
        most = min(self._top_n, len(count))
        least = max(1, int(np.partition(count, len(count) - most)[len(count) - most]))
        at = np.flatnonzero(count >= least)
        rows = list(
            zip(count[at].tolist(), self._catalogue.movie_ids[at].tolist(), state.half_sum[at].tolist(), strict=True)
        )
        rows += [(int(stars.sum()), movie_id, int(stars @ _HALVES)) for movie_id, stars in state.unknown.items()]
        rows.sort(key=lambda row: (-row[0], row[1]))
        return [
            {"movieId": movie_id, "count": n, "avg_rating": _mean(half_sum, n)}
            for n, movie_id, half_sum in rows[: self._top_n]
        ]

    def _by_genre(self, state: _Window) -> list[dict[str, Any]]:
        rows = [
            {"genre": name, "count": n, "avg_rating": _mean(half_sum, n)}
            for name, n, half_sum in zip(
                self._catalogue.genre_names,
                state.genre_count.tolist(),
                state.genre_half_sum.tolist(),
                strict=True,
            )
            if n
        ]
        return sorted(rows, key=lambda row: (-row["count"], row["genre"]))


def unpack(packed: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Two 32-bit counts a number → shape (n, 10): counts of 1 … 10 half stars."""
    stars = np.empty((len(packed), 10), np.int64)
    stars[:, 0::2] = packed & _LOW
    stars[:, 1::2] = packed >> np.int64(32)
    return stars


def percentile(histogram: npt.NDArray[np.int64], share: float) -> float | None:
    """Nearest-rank percentile in stars: the least rating that at least ``share`` of the ratings do not exceed."""
    total = int(histogram.sum())
    if total == 0:
        return None
    rank = max(1, int(np.ceil(share * total - 1e-9)))
    return float(_STARS[int(np.searchsorted(np.cumsum(histogram), rank))])


def _mean(half_sum: int, count: int) -> float | None:
    """Mean rating in stars, rounded to 6 decimals."""
    return round(half_sum / 2 / count, 6) if count else None
