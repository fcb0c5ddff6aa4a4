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
from pathlib import Path
from typing import Any

from bench.common import child, embedded_broker, median
from bench.delivery import delete_topics
from ray_pipeline.config import load_settings
from ray_pipeline.kafka.read import count_records
from ray_pipeline.kafka.topics import ensure_topics

RATINGS = 2_000_000
ROUNDS = 5
BEFORE = "4410591"
HERE = Path(__file__).parent.parent

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
    rows: dict[str, list[dict[str, Any]]] = {}
    with tree_before() as before, embedded_broker() as bootstrap:
        ways = {"before": (before, {}), "defaults": (HERE, {})}
        ways |= {name: (HERE, changes) for name, changes in {**GROUPS, "all on": ALL}.items()}
        for number in range(ROUNDS):
            names = list(ways)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                tree, changes = ways[name]
                topic = f"{name.replace(' ', '-')}-{number}"
                ensure_topics(load_settings(ratings_topic=topic, progress_topic=f"{topic}.progress"), bootstrap)
                arguments = [
                    bootstrap,
                    topic,
                    "plain",
                    "200",
                    str(RATINGS),
                    *([json.dumps(changes)] if changes else []),
                ]
                row = json.loads(child([sys.executable, "-m", "bench.delivery", *arguments], tree)[0])
                row["counted"] = count_records(bootstrap, topic).total
                assert row["counted"] == row["sent"], (name, row)
                rows.setdefault(name, []).append(row)
                delete_topics(bootstrap, topic)
                print(number, name, row, flush=True)
    rate = {name: median(found, "rate") for name, found in rows.items()}
    return {
        "ratings": RATINGS,
        "rounds": ROUNDS,
        "before": BEFORE,
        "defaults / before": round(rate["defaults"] / rate["before"], 2),
        **{f"{name} / defaults": round(rate[name] / rate["defaults"], 2) for name in [*GROUPS, "all on"]},
        "ways": {
            name: {
                "ratings_per_s": round(rate[name]),
                "cpu_us_each": round(median(found, "cpu_us"), 2),
                "rounds": found,
            }
            for name, found in rows.items()
        },
    }


@contextlib.contextmanager
def tree_before() -> Iterator[Path]:
    """The project as it was before the knobs, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", BEFORE], cwd=HERE, capture_output=True, check=False)
        if archive.returncode:
            raise RuntimeError(f"commit {BEFORE} is not at hand, needed to compare with: fetch the whole history")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)
