"""What is watched: a user passes movies over that taste speaks against.

A user looks at up to ``LOOKS`` movies, one after another, each drawn by popularity, and takes the first that is not passed
over; the last is taken in any case. A movie is passed over with probability ``taste_exposure · Φ(-t / s)``, where t is what the
user's taste and the movie's bias add to the score, relative to the user's own mean, and s is half its standard deviation. So at
0 popularity alone decides, and at 1 an averagely liked movie is passed over every other time, a loved one hardly ever. Noise
has no part in it: it is drawn when the movie was seen.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ray_pipeline.config import Settings
from ray_pipeline.model.streams import normal_table

__all__ = ["LOOKS", "Exposure"]

LOOKS = 4
"""How many movies a user looks at, at most."""

_BITS = 1 << 16
_LOW = np.uint64(0xFFFF)


class Exposure:
    """Which candidates are passed over.

    Args:
        settings: ``taste_exposure``, ``rating_sd``, ``movie_bias_share``, ``factor_share`` are used.
    """

    def __init__(self, settings: Settings) -> None:
        spread = settings.rating_sd * math.sqrt(settings.movie_bias_share + settings.factor_share) / 2
        passed = round(settings.taste_exposure * _BITS)
        # one 16-bit draw decides both: below `passed` taste is asked, and where it lies there is a normal variate
        self._bars = np.full(_BITS, -np.inf, np.float32)
        places = (np.arange(passed, dtype=np.int64) * 2 + 1) * _BITS // (2 * max(1, passed))
        self._bars[:passed] = normal_table()[places] * np.float32(spread)

    def passes(self, look: int, tastes: npt.NDArray[np.float32], word: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Whether each is passed over.

        Args:
            look: which look it is, 0 … ``LOOKS - 2``.
            tastes: shape (n,), float32, stars: the score relative to the user's own mean.
            word: shape (n,), uint64, uniform; each look uses 16 bits of its own.
        """
        return np.asarray(tastes < self._bars.take((word >> np.uint64(16 * look)) & _LOW))
