"""Rating created → its windows readable in the API, at 1,000 and 10,000 ratings a second."""

from __future__ import annotations

import time
from typing import Any

from bench.common import counted_to_the_last, get, goal, median, pipeline, post, wait_for

RATES = (1_000, 10_000)
ROUNDS = 3
SETTLE_S, MEASURE_S = 10, 40
GOALS_MS = {"p50": 500, "p99": 1500}


def run() -> dict[str, Any]:
    rows: dict[int, list[dict[str, Any]]] = {rate: [] for rate in RATES}
    with pipeline("--rate", str(RATES[0]), "--no-ui") as info:
        api = info["urls"]["api"]
        wait_for(lambda: get(f"{api}/metrics/summary")["status"] == "ok", 120)
        time.sleep(SETTLE_S)  # the job's first batches are slower
        for number in range(ROUNDS):
            for rate in RATES if number % 2 == 0 else RATES[::-1]:
                assert post(f"{api}/control/rate", rate=rate)["applied"]
                time.sleep(SETTLE_S + MEASURE_S)  # the API's percentiles are those of the last 30 s
                summary = get(f"{api}/metrics/summary")
                row = {**summary["latency_ms"], "batch_ms": summary["job"]["batch_duration_ms"]}
                rows[rate].append({**row, "delivered_rate": summary["generator"]["delivered_rate"]})
                print(rate, rows[rate][-1], flush=True)
        counts = counted_to_the_last(info)
    medians = {rate: {name: median(found, name) for name in GOALS_MS} for rate, found in rows.items()}
    return {
        **counts,
        "goals": [
            goal(f"{name} at {rate:,}/s, ms", ms, most=GOALS_MS[name])
            for rate, found in medians.items()
            for name, ms in found.items()
        ],
        "rounds": {f"{rate}/s": found for rate, found in rows.items()},
    }
