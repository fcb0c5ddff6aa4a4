"""Memory of 10 million users and 1 million movies, rank 20: what an actor holds, and what a node shares."""

from __future__ import annotations

import time
from typing import Any

import psutil

from ray_pipeline.config import load_settings
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_movies, build_user_map
from ray_pipeline.model.ratings import ShardModel


def run() -> dict[str, Any]:
    settings = load_settings(users=10_000_000, movies=1_000_000)
    steps: dict[str, dict[str, float]] = {}
    process = psutil.Process()

    def step(name: str, began: float, before: int) -> None:
        grown = (process.memory_info().rss - before) / 2**20
        steps[name] = {"seconds": round(time.monotonic() - began, 2), "grown_mib": round(grown)}
        print(name, steps[name], flush=True)

    began, before = time.monotonic(), process.memory_info().rss
    catalogue = load_catalogue(settings)
    movies = build_movies(settings, catalogue)
    step("1,000,000 movies, one copy a node", began, before)
    began, before = time.monotonic(), process.memory_info().rss
    user_map = build_user_map(settings)
    step("partition of 10,000,000 users", began, before)
    began, before = time.monotonic(), process.memory_info().rss
    model = ShardModel.of_shard(settings, 0, user_map, movies)
    step("users of one of four shards", began, before)
    began, before = time.monotonic(), process.memory_info().rss
    drawn = sum(len(model.draw(n * 100_000, 100_000).user_ids) for n in range(10))
    step("1,000,000 ratings drawn", began, before)
    assert drawn == 1_000_000
    return steps
