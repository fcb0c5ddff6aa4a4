"""Which partition a user belongs to: murmur2 of the key, as Kafka's Java client computes it.

The algorithm is Austin Appleby's MurmurHash2 with the seed and sign mask of
``org.apache.kafka.common.utils.Utils.murmur2`` and ``BuiltInPartitioner.partitionForKey``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["partition_of"]

_SEED = np.uint32(0x9747B28C)
_M = np.uint32(0x5BD1E995)
_R = np.uint32(24)


def partition_of(user_ids: npt.NDArray[np.int64], partitions: int) -> npt.NDArray[np.int32]:
    """Partition of each user's key (the id as a decimal string).

    Args:
        user_ids: shape (n,), int64, ≥ 0.
        partitions: number of partitions, ≥ 1.

    Returns:
        Shape (n,), int32, 0 … partitions - 1.
    """
    result = np.zeros(len(user_ids), np.int32)
    digits = np.ones(len(user_ids), np.int64)
    power = 10
    while (longer := user_ids >= power).any():
        digits += longer
        power *= 10
    for length in np.unique(digits).tolist():
        chosen = digits == length
        hashed = _murmur2(_decimal(user_ids[chosen], length))
        result[chosen] = (hashed & np.uint32(0x7FFFFFFF)).astype(np.int64) % partitions
    return result


def _decimal(values: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.uint32]:
    """The ASCII digits, shape (length, n)."""
    powers = 10 ** np.arange(length - 1, -1, -1, dtype=np.int64)
    return ((values[None, :] // powers[:, None]) % 10 + ord("0")).astype(np.uint32)


def _murmur2(text: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    length, n = text.shape
    h = np.full(n, _SEED ^ np.uint32(length), np.uint32)
    whole = length - length % 4
    for i in range(0, whole, 4):
        k = text[i] | text[i + 1] << np.uint32(8) | text[i + 2] << np.uint32(16) | text[i + 3] << np.uint32(24)
        k = k * _M
        k ^= k >> _R
        h = (h * _M) ^ (k * _M)
    if length % 4:
        for i in range(whole, length):
            h ^= text[i] << np.uint32(8 * (i - whole))
        h = h * _M
    h ^= h >> np.uint32(13)
    h = h * _M
    return h ^ (h >> np.uint32(15))
