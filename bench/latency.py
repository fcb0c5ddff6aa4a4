"""Rating created → its windows readable in the API, at 1,000 and 10,000 ratings a second."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

from bench.common import pipeline, wait_for

RATES = (1_000, 10_000)
SETTLE_S, MEASURE_S = 20, 40


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


def set_rate(api: str, rate: float) -> None:
    request = urllib.request.Request(
        f"{api}/control/rate", json.dumps({"rate": rate}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert json.load(answer)["applied"]


def run() -> dict[str, Any]:
    result: dict[str, Any] = {}
    with pipeline("--rate", str(RATES[0]), "--no-ui") as info:
        api = info["urls"]["api"]
        wait_for(lambda: get(f"{api}/metrics/summary")["status"] == "ok", 120)
        for rate in RATES:
            set_rate(api, rate)
            time.sleep(SETTLE_S + MEASURE_S)  # the API's percentiles are those of the last 30 s
            summary = get(f"{api}/metrics/summary")
            result[f"{rate}/s"] = {
                "latency_ms": summary["latency_ms"],
                "batch_ms": summary["job"]["batch_duration_ms"],
                "delivered_rate": summary["generator"]["delivered_rate"],
            }
    return result
