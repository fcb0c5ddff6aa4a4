"""Drawing from a discrete law in constant time, exactly: Walker's alias method with whole-number weights.

The table is built without a loop over the items, after Hübschle-Schneider and Sanders, "Parallel Weighted Random Sampling"
(ESA 2019): items below the mean weight ("light") are filled up, in order, by items above it ("heavy"), and prefix sums of
what is lacking and what is left over say who fills whom.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["AliasTable"]

_HALF_WORD = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFF_FFFF)


@dataclass(frozen=True, slots=True)
class AliasTable:
    """A law over the items 0 … n - 1.

    Attributes:
        threshold: shape (n,), uint32: below it a draw keeps its slot's own item (in units of 2^-32).
        alias: shape (n,), int32: the item a draw takes otherwise.
    """

    threshold: npt.NDArray[np.uint32]
    alias: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.alias)

    @classmethod
    def from_weights(cls, weights: npt.NDArray[np.int64]) -> AliasTable:
        """Build the table.

        Args:
            weights: shape (n,), int64, ≥ 0, not all 0, with ``n * sum(weights)`` < 2^63.

        Raises:
            ValueError: the weights break one of these rules.
        """
        n = len(weights)
        total = int(weights.sum()) if n else 0
        if n == 0 or total <= 0 or int(weights.min()) < 0:
            msg = "weights must be at least one number ≥ 0, not all 0"
            raise ValueError(msg)
        if n * total >= 2**63:
            msg = f"{n} weights of sum {total} overflow 63 bits: scale them down"
            raise ValueError(msg)
        scaled = weights * n  # in units in which the mean is `total`
        kept = scaled.copy()
        alias = np.arange(n, dtype=np.int32)
        light = np.flatnonzero(scaled < total)
        heavy = np.flatnonzero(scaled >= total)
        if len(light):
            lacking = np.cumsum(total - scaled[light])
            left_over = np.cumsum(scaled[heavy] - total)
            # light i is filled by the first heavy item whose surplus is not used up before i
            before = lacking - (total - scaled[light])
            filler = np.searchsorted(left_over, before, side="right")
            alias[light] = heavy[np.minimum(filler, len(heavy) - 1)]
            # heavy j gives more than it has to the light item that crosses its end, and is filled by j + 1
            crossing = np.searchsorted(lacking, left_over, side="left")
            given = np.append(lacking, lacking[-1])[crossing]
            over = np.clip(given - left_over, 0, None)
            over[-1] = 0
            kept[heavy] = total - over
            alias[heavy[:-1]] = heavy[1:]
        # total·(2^32 - 1) may pass 63 bits: divide in float, whose rounding here is one correctly rounded division
        share = kept.astype(np.float64) / np.float64(total)
        threshold = np.minimum(np.floor(share * 2.0**32), 2.0**32 - 1).astype(np.uint32)
        full = kept >= total
        alias[full] = np.flatnonzero(full).astype(np.int32)
        return cls(threshold, alias)

    @staticmethod
    def scaled(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Weights that a table can hold: as they are where it can, else halved until it can; what is above 0 stays so.

        Args:
            weights: shape (n,), int64, ≥ 0, n < 2^31, with a sum below 2^63.
        """
        product = len(weights) * int(weights.sum())
        if product < 2**63:
            return weights
        # n · sum falls below 2^62, and weights that are held at 1 add less than n² < 2^62
        halved = weights >> (product.bit_length() - 62)
        return np.where(weights > 0, np.maximum(halved, 1), 0)

    def draw(self, word: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """One item a word.

        Args:
            word: shape (k,), uint64, uniform: its high half chooses the slot, its low half slot or alias.

        Returns:
            Shape (k,), int64, 0 … n - 1.
        """
        slot = (((word >> _HALF_WORD) * np.uint64(len(self.alias))) >> _HALF_WORD).astype(np.int64)
        keep = (word & _LOW_HALF).astype(np.uint32) < self.threshold.take(slot)
        return np.where(keep, slot, self.alias.take(slot))
