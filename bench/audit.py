"""Records a second that the audit reads and compares, beside only reading and counting them; same topic, alternated rounds."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from bench.common import BIN, child, embedded_broker, goal, median
from ray_pipeline.kafka.read import count_records

RATINGS = 3_000_000
ROUNDS = 3


def run() -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {"audit": [], "audit, one reader": [], "count": []}
    with embedded_broker() as bootstrap:
        flags = ["--bootstrap-servers", bootstrap, "--rate", "1e8", "--ratings", str(RATINGS), "--actors", "1"]
        child([str(BIN / "ray-pipeline"), "generate", *flags])
        for _ in range(ROUNDS):
            for name, more in (("audit", []), ("audit, one reader", ["--processes", "1"])):
                out, _, cpu = child(
                    [str(BIN / "ray-pipeline"), "audit", "--bootstrap-servers", bootstrap, "--json", *more]
                )
                report = json.loads(out)
                assert report["verdict"] == "agreed" and report["records"]["found"] == RATINGS, report
                rate = report["records_per_s"]
                rows[name].append({"rate": rate, "cpu_us": cpu / RATINGS * 1e6, "duration_s": report["duration_s"]})
            began = time.monotonic()
            assert count_records(bootstrap, "ratings").total == RATINGS
            rows["count"].append({"rate": RATINGS / (time.monotonic() - began), "cpu_us": 0.0, "duration_s": 0.0})
    return {
        "ratings": RATINGS,
        "goals": [goal("records a second", round(median(rows["audit"], "rate")), least=500_000)],
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        **{
            name: {
                "records_per_s": round(median(found, "rate")),
                "cpu_us_each": round(median(found, "cpu_us"), 2),
                "rounds": found,
            }
            for name, found in rows.items()
        },
    }
