"""Some of the users, chosen by the seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ray_pipeline.model.streams import halfwords_of

__all__ = ["cohort"]


def cohort(
    seed: int, name: str, user_ids: npt.NDArray[np.int64], share: float, among: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.bool_]:
    """Who of some users belongs to a cohort; at least one does.

    Args:
        seed: the run's.
        name: of the cohort's stream.
        user_ids: shape (n,), int64, ascending, n ≥ 1.
        share: of the users, 0 … 1.
        among: shape (n,), who may be chosen, at least one; None = all.

    Returns:
        Shape (n,), bool.
    """
    drawn = halfwords_of(seed, name, user_ids, 2).astype(np.int64)
    key = drawn[:, 0] << 16 | drawn[:, 1]
    if among is not None:
        key = np.where(among, key, 2**32)
    member = key < round(share * 2**32)
    member[np.argmin(key)] = True
    return member
