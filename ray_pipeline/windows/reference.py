"""What the windows must hold, computed another way: NumPy over plain columns, sharing no code with the Spark job or its collector.

Slow and simple on purpose. Tests compare the job with it, to the last count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Ratings", "Reference", "ReferenceWindow", "reference"]


@dataclass(frozen=True, slots=True)
class Ratings:
    """Valid ratings in columns.

    Attributes:
        movie_ids: shape (n,), int64.
        stars: shape (n,), float64, 0.5 … 5.0.
        timestamps_ms: shape (n,), int64, epoch milliseconds.
    """

    movie_ids: npt.NDArray[np.int64]
    stars: npt.NDArray[np.float64]
    timestamps_ms: npt.NDArray[np.int64]


@dataclass
class ReferenceWindow:
    """One window: every rating in it, by movie."""

    stars_of: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def stars(self) -> npt.NDArray[np.float64]:
        """All ratings, ascending."""
        return np.sort(np.concatenate([np.array(s) for s in self.stars_of.values()]))

    @property
    def count(self) -> int:
        """How many ratings."""
        return sum(len(s) for s in self.stars_of.values())

    @property
    def avg_rating(self) -> float:
        """Their mean, stars, 6 decimals."""
        return round(float(self.stars.sum()) / self.count, 6)

    def percentile(self, share: float) -> float:
        """Nearest rank: the ceil(share · n)-th rating in ascending order."""
        stars = self.stars
        return float(stars[max(1, int(np.ceil(share * len(stars) - 1e-9))) - 1])

    def histogram(self) -> list[int]:
        """Counts of 0.5, 1.0, … 5.0 stars."""
        return [int((self.stars == half / 2).sum()) for half in range(1, 11)]

    def top(self, most: int) -> list[tuple[int, int, float]]:
        """(movie id, count, mean), by count descending, then movie id ascending."""
        rows = [(movie, len(s), round(sum(s) / len(s), 6)) for movie, s in self.stars_of.items()]
        return sorted(rows, key=lambda row: (-row[1], row[0]))[:most]

    def by_genre(self, genres_of: Mapping[int, Sequence[str]]) -> list[tuple[str, int, float]]:
        """(genre, count, mean), by count descending, then name; a movie counts in each of its genres."""
        stars: dict[str, list[float]] = defaultdict(list)
        for movie, given in self.stars_of.items():
            for genre in genres_of.get(movie, ()):
                stars[genre].extend(given)
        rows = [(genre, len(s), round(sum(s) / len(s), 6)) for genre, s in stars.items()]
        return sorted(rows, key=lambda row: (-row[1], row[0]))


@dataclass
class Reference:
    """All windows of one kind, by start in epoch milliseconds, and what was too late for them.

    Attributes:
        windows: the windows that hold at least one rating.
        late: memberships (a rating in a window) dropped as late.
    """

    windows: dict[int, ReferenceWindow] = field(default_factory=lambda: defaultdict(ReferenceWindow))
    late: int = 0


def reference(batches: Sequence[Ratings], size_ms: int, slide_ms: int, watermark_ms: int) -> Reference:
    """Windows ``[k · slide, k · slide + size)`` over ratings that arrive in micro-batches.

    The watermark is the newest event time of the batches before, less ``watermark_ms``. A rating is too late for a window when
    the watermark that was in force in the batch before had reached the window's end: Spark drops by the watermark of the
    batch before (since 3.4) and evicts by its own.

    Args:
        batches: ratings by micro-batch, in order.
        size_ms: length of a window.
        slide_ms: distance between starts.
        watermark_ms: how long a window waits.
    """
    result = Reference()
    newest_ms = late_ms = evict_ms = -1
    for batch in batches:
        late_ms, evict_ms = evict_ms, max(evict_ms, newest_ms - watermark_ms)
        for movie, stars, at_ms in zip(
            batch.movie_ids.tolist(), batch.stars.tolist(), batch.timestamps_ms.tolist(), strict=True
        ):
            start = (at_ms // slide_ms) * slide_ms
            while start + size_ms > at_ms:
                if start + size_ms <= late_ms:
                    result.late += 1
                else:
                    result.windows[start].stars_of[movie].append(stars)
                start -= slide_ms
            newest_ms = max(newest_ms, at_ms)
    return result
