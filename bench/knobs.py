"""What the workload's knobs cost: full ratings delivered a second and CPU µs each, all at their defaults, by group, and all on.

One broker, alternated rounds, medians over rounds; four shards on threads of one process, exactly-once at 200 ms, plain
delivery, without pacing; what was sent is counted by reading it back. ``before`` is the tree before there were any of
these knobs, with its own benchmark; it needs the repository's history. Formats are not among them: values in another than
the default are written one at a time.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import Row, alternated, child, goal, medians, ratio

RATINGS = 2_000_000
ROUNDS = 5
BEFORE = "4410591"
HERE = Path(__file__).parent.parent
ONE_PROCESS = {"actors": 1}

GROUPS: dict[str, dict[str, Any]] = {
    "plan": {"plan": "sine(mean=1000000, amplitude=500000, period=1m)", "arrivals": "poisson"},
    "people": {
        "genre_share": 0.5,
        "user_scale_sigma": 0.3,
        "whole_star_share": 0.4,
        "taste_exposure": 0.5,
        "session_length": 5.0,
        "new_user_share": 0.2,
        "new_movie_share": 0.2,
        "arrival_ratings": 1_000_000,
    },
    "drift": {
        "drift": ["gradual from=100000 to=900000 size=-1 genre=Drama", "recurring period=50000 size=1 cohort=0.3"],
        "attack": ["review-bomb movie=318 at=200000 ratings=100000 cohort=0.005 stealth=0.25 intensity=0.2"],
    },
    "broken data": {
        "late_share": 0.1,
        "disorder_share": 0.2,
        "duplicate_share": 0.05,
        "drop_share": 0.02,
        "malformed_share": 0.01,
        "missing_field_share": 0.01,
        "unknown_field_share": 0.01,
        "out_of_range_share": 0.01,
        "tombstone_share": 0.01,
        "future_share": 0.001,
        "clock_skew": "1:-10s",
        "silent": "2:every=10m,for=1m",
    },
}
ALL = {name: value for group in GROUPS.values() for name, value in group.items()}


def run() -> dict[str, Any]:
    with tree_before() as before:
        ways = {"before": partial(_send, before, {}), "defaults": partial(_send, HERE, ONE_PROCESS)}
        ways |= {name: partial(_send, HERE, ONE_PROCESS | on) for name, on in {**GROUPS, "all on": ALL}.items()}
        rows = alternated(ways, ROUNDS)
    return {
        "ratings": RATINGS,
        "rounds": ROUNDS,
        "before": BEFORE,
        "goals": [
            goal("defaults / before", ratio(rows, "defaults", "before")["median"], least=0.9),
            goal("all on / defaults", ratio(rows, "all on", "defaults")["median"], least=0.4),
        ],
        "defaults / before": ratio(rows, "defaults", "before"),
        **{f"{name} / defaults": ratio(rows, name, "defaults") for name in [*GROUPS, "all on"]},
        "ways": medians(rows),
    }


def _send(tree: Path, on: dict[str, Any], bootstrap: str, topic: str) -> Row:
    """Plain delivery by the benchmark of a tree."""
    arguments = [bootstrap, topic, "plain", "200", str(RATINGS), *([json.dumps(on)] if on else [])]
    row: Row = json.loads(child([sys.executable, "-m", "bench.delivery", *arguments], tree)[0])
    return row


@contextlib.contextmanager
def tree_before() -> Iterator[Path]:
    """The project as it was before the knobs, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", BEFORE], cwd=HERE, capture_output=True, check=False)
        if archive.returncode:
            raise RuntimeError(f"commit {BEFORE} is not at hand, needed to compare with: fetch the whole history")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)
