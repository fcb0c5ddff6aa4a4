"""What a check finds: an estimate of a knob, a distance from a law, a count of what must not be, or why it cannot tell."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["Counted", "Distance", "Estimate", "Measure", "Unchecked", "quadratic"]

_RELATIVE_ZERO = 1e-9


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number estimated from ratings, with a normal error.

    Attributes:
        value: the estimate.
        error: its standard error, > 0.
        declared: what the settings make it.
    """

    value: float
    error: float
    declared: float

    @property
    def p_value(self) -> float:
        """Probability of being so far off, or further, when all is as declared."""
        if not math.isfinite(self.value):
            return 0.0
        return float(2.0 * stats.norm.sf(abs(self.value - self.declared) / self.error))

    def interval(self, level: float) -> tuple[float, float]:
        """Confidence interval of a level, such as 0.99."""
        reach = float(stats.norm.isf((1.0 - level) / 2)) * self.error
        return self.value - reach, self.value + reach

    def detectable(self, level: float, power: float) -> float:
        """Difference that is found with a probability of ``power`` by a test at confidence ``level``."""
        return float(stats.norm.isf((1.0 - level) / 2) + stats.norm.ppf(power)) * self.error


@dataclass(frozen=True, slots=True)
class Distance:
    """How far observed shares are from a law, and how likely so far a distance is when the law holds.

    Attributes:
        value: total variation distance, 0 … 1: the share of ratings that would have to be others.
        chi_square: the statistic that is judged.
        degrees: its degrees of freedom.
    """

    value: float
    chi_square: float
    degrees: int

    @property
    def declared(self) -> float:
        """No distance."""
        return 0.0

    @property
    def p_value(self) -> float:
        """Probability of a statistic so large, or larger, when the law holds."""
        return float(stats.chi2.sf(self.chi_square, self.degrees)) if math.isfinite(self.chi_square) else 0.0


@dataclass(frozen=True, slots=True)
class Counted:
    """A number that admits no chance: it lies in bounds, or it does not.

    Attributes:
        value: what was found.
        declared: what must be.
        low: least value that the ratings are compatible with.
        high: greatest one.
    """

    value: float
    declared: float
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float, declared: float) -> Counted:
        """No tolerance."""
        return cls(value, declared, value, value)

    @property
    def holds(self) -> bool:
        """Whether what is declared lies in the bounds."""
        return self.low <= self.declared <= self.high


@dataclass(frozen=True, slots=True)
class Unchecked:
    """These ratings cannot tell.

    Attributes:
        reason: why.
    """

    reason: str


Measure = Estimate | Distance | Counted | Unchecked


def quadratic(difference: npt.NDArray[np.float64], covariance: npt.NDArray[np.float64]) -> tuple[float, int]:
    """dᵀ C⁻¹ d over the directions in which C allows any difference.

    Args:
        difference: shape (k,), observed minus expected.
        covariance: shape (k, k), of the difference when all is as declared; may be singular.

    Returns:
        The statistic, χ² with the second number as its degrees of freedom; infinite where there is a difference that the law
        does not allow.
    """
    size, direction = np.linalg.eigh(covariance)
    along = direction.T @ difference
    free = size > _RELATIVE_ZERO * max(float(size[-1]), 1e-300)
    if np.abs(along[~free]).max(initial=0.0) > 1e-6 * max(1.0, float(np.abs(difference).max(initial=0.0))) + 1e-6:
        return math.inf, max(1, int(free.sum()))
    return float((along[free] ** 2 / size[free]).sum()), max(1, int(free.sum()))
