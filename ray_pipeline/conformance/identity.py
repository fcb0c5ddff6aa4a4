"""Check of which stream this is."""

from __future__ import annotations

import numpy as np

from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Counted, Measure

__all__ = ["same_draws"]

_LOOKED_AT = 10_000


def same_draws(evidence: Evidence) -> Measure:
    """Share of ratings whose user and movie the seed draws at their place; the first 10,000 of each partition are looked at."""
    world, sample = evidence.declared, evidence.sample
    same = looked_at = 0
    for partition in range(world.settings.partitions):
        row = np.flatnonzero((sample.partition == partition) & (sample.index < _LOOKED_AT))
        if not len(row):
            continue
        drawn = world.shard(partition).draw(0, int(sample.index[row].max()) + 1)
        at = sample.index[row]
        equal = (drawn.user_ids[at] == sample.user_ids[row]) & (drawn.movie_ids[at] == sample.movie_ids[row])
        same, looked_at = same + int(equal.sum()), looked_at + len(row)
    return Counted.exactly(same / max(1, looked_at), 1.0)
