"""The highest rate that the whole pipeline on this machine holds for 60 s with the lag not growing, and counted = delivered."""

from __future__ import annotations

import time
from typing import Any

import psutil

from bench.common import counted_to_the_last, get, pipeline, post, wait_for

RATES = (10_000, 50_000, 100_000, 160_000, 200_000, 225_000, 250_000)
HOLD_S = 60


def run() -> dict[str, Any]:
    steps = []
    with pipeline("--rate", "1000", "--no-ui") as info:
        api = info["urls"]["api"]
        wait_for(lambda: get(f"{api}/metrics/summary")["status"] == "ok", 120)
        for rate in RATES:
            assert post(f"{api}/control/rate", rate=rate)["applied"]
            time.sleep(10)
            lags = []
            busy = _cpu_by_process(info["pid"])
            began = time.monotonic()
            while time.monotonic() - began < HOLD_S:
                time.sleep(2)
                summary = get(f"{api}/metrics/summary")
                lags.append(int(summary["job"]["lag"]))
            used = {
                name: round((s - busy.get(name, 0.0)) / HOLD_S, 2) for name, s in _cpu_by_process(info["pid"]).items()
            }
            third = len(lags) // 3
            growing = sum(lags[-third:]) / third > sum(lags[:third]) / third + rate
            step = {
                "rate": rate,
                "delivered_rate": summary["generator"]["delivered_rate"],
                "behind_s": summary["generator"]["behind_s"],
                "lag_first_third": sum(lags[:third]) // third,
                "lag_last_third": sum(lags[-third:]) // third,
                "batch_ms": summary["job"]["batch_duration_ms"],
                "cores_used": used,
            }
            step["held"] = not growing and step["behind_s"] < 1 and step["delivered_rate"] > 0.98 * rate
            steps.append(step)
            print(step, flush=True)
            if not step["held"]:
                break
        counts = counted_to_the_last(info)
    held, used = [step for step in steps if step["held"]], steps[-1]["cores_used"]
    return {
        "highest_held_rate": held[-1]["rate"] if held else 0,
        # at the last rate, which was not held as a rule
        "bottleneck": {
            "cores": psutil.cpu_count(),
            "used": round(sum(used.values()), 2),
            "most": max(used, key=used.get),
        },
        "steps": steps,
        **counts,
    }


def _cpu_by_process(pid: int) -> dict[str, float]:
    """CPU seconds so far, by what the process is."""
    used: dict[str, float] = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        name = next(
            (
                what
                for mark, what in (
                    ("kafka.Kafka", "broker"),
                    ("_WorkerActor", "generator"),
                    ("_ServingActor", "API"),
                    ("_ProcessingActor", "Spark driver, Python"),
                    ("_VerificationActor", "oracle and scoreboard"),
                    ("DefaultWorker", "Spark executor and master"),
                    ("SparkSubmit", "Spark driver, JVM"),
                )
                if mark in line
            ),
            "Ray and others",
        )
        used[name] = used.get(name, 0.0) + times.user + times.system
    return used
