"""Counter-based random words: the only source of randomness in the package.

A *stream* is named by (seed, name, number). Counter ``n`` of a stream is one block of Philox4x64-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC'11): four 64-bit words that can be made alone, in any order, by anybody.
NumPy promises that the raw words of ``Philox`` do not change between versions.
"""

from __future__ import annotations

import functools
import hashlib
import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

__all__ = [
    "WORDS_PER_COUNTER",
    "dense_ranges",
    "halfwords",
    "halfwords_of",
    "lognormal_scales",
    "lognormal_weights",
    "normal_table",
    "pairs",
    "words",
]

WORDS_PER_COUNTER = 4
"""64-bit words made by one counter of Philox4x64."""

_TABLE_SIZE = 1 << 16
_CHUNK = 1 << 17


def _key(seed: int, name: str, number: int) -> int:
    digest = hashlib.sha256(f"ray-pipeline/1/{seed}/{name}/{number}".encode()).digest()
    return int.from_bytes(digest[:16], "little")


def words(seed: int, name: str, number: int, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Words of counters ``first … first + count - 1`` of a stream.

    Args:
        seed: the run's seed.
        name: what the stream is for, such as ``"events"``.
        number: which of them, such as the partition.
        first: first counter, ≥ 0.
        count: how many counters, ≥ 0.

    Returns:
        Shape (count, 4), uint64, each word uniform over all 64-bit integers.
    """
    generator = np.random.Philox(key=_key(seed, name, number), counter=first)
    return generator.random_raw(count * WORDS_PER_COUNTER).reshape(count, WORDS_PER_COUNTER)


def pairs(seed: int, name: str, number: int, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Two words for each of the places ``first … first + count - 1`` of a stream, two places a counter.

    Returns:
        Shape (count, 2), uint64, each word uniform over all 64-bit integers.
    """
    counter = first // 2
    made = words(seed, name, number, counter, -(-(first + count) // 2) - counter).reshape(-1, 2)
    return made[first - 2 * counter : first - 2 * counter + count]


def halfwords(seed: int, name: str, first: int, count: int) -> npt.NDArray[np.uint16]:
    """The 16-bit words at positions ``first … first + count - 1`` of a stream, sixteen a counter, low ones first.

    Returns:
        Shape (count,), uint16, uniform.
    """
    per_counter = WORDS_PER_COUNTER * 4
    counter = first // per_counter
    counters = -(-(first + count) // per_counter) - counter
    low_first = words(seed, name, 0, counter, counters).astype("<u8", copy=False).reshape(-1).view("<u2")
    start = first - counter * per_counter
    return low_first[start : start + count]


def halfwords_of(seed: int, name: str, ids: npt.NDArray[np.int64], each: int) -> npt.NDArray[np.uint16]:
    """The ``each`` 16-bit words that belong to every id; makes whole ranges of ids and picks, so ids should be dense.

    Args:
        seed: the run's seed.
        name: what the stream is for.
        ids: shape (n,), int64, ascending, ≥ 0.
        each: words an id.

    Returns:
        Shape (n, each), uint16, uniform.
    """
    found = np.empty((len(ids), each), np.uint16)
    for lo, hi in dense_ranges(ids):
        first, last = int(ids[lo]), int(ids[hi - 1])
        drawn = halfwords(seed, name, first * each, (last - first + 1) * each)
        found[lo:hi] = drawn.reshape(-1, each)[ids[lo:hi] - first]
    return found


def dense_ranges(ids: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut ascending ids into runs that span at most a chunk of ids, so that memory stays bounded."""
    bounds = np.flatnonzero(np.diff(ids // _CHUNK, prepend=-1)).tolist() if len(ids) else []
    return list(zip(bounds, [*bounds[1:], len(ids)], strict=False))


@functools.cache
def normal_table() -> npt.NDArray[np.float32]:
    """The standard normal law as 65,536 equally likely values.

    Entry k is the quantile at (k + ½) / 65,536, so a uniform 16-bit word is a normal variate without any call to log, sqrt
    or cos, whose last bits differ between CPUs. The values reach from −4.2 to 4.2; their variance is 0.9999.

    Returns:
        Shape (65536,), float32, ascending, read-only.
    """
    quantile = NormalDist().inv_cdf
    half = [quantile((k + 0.5) / _TABLE_SIZE) for k in range(_TABLE_SIZE // 2)]
    table = np.array(half + [-value for value in reversed(half)], dtype=np.float32)
    table.setflags(write=False)
    return table


@functools.cache
def lognormal_weights(sigma: float) -> npt.NDArray[np.int64]:
    """exp(sigma · z) for each entry z of :func:`normal_table`, as whole numbers (unit 1/4096).

    Whole numbers make every sum over them exact, in any order.

    Returns:
        Shape (65536,), int64, all ≥ 1, read-only.
    """
    table = np.array([max(1, round(4096 * math.exp(sigma * float(z)))) for z in normal_table()], np.int64)
    table.setflags(write=False)
    return table


@functools.cache
def lognormal_scales(sigma: float) -> npt.NDArray[np.float32]:
    """exp(sigma · z) for each entry z of :func:`normal_table`, divided so that the mean square is 1.

    Returns:
        Shape (65536,), float32, all > 0, read-only.
    """
    raw = [math.exp(sigma * float(z)) for z in normal_table()]
    root = math.sqrt(math.fsum(value * value for value in raw) / len(raw))
    table = np.array([value / root for value in raw], np.float32)
    table.setflags(write=False)
    return table
