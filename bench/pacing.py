"""Delivered rate over 10 s beside the target: the generator alone, exactly-once, two actors."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import BIN, embedded_broker
from ray_pipeline.kafka.read import count_records, read_compacted

RATES = (10.0, 1_000.0, 10_000.0, 50_000.0, 100_000.0)
SETTLE_S, SPAN_S = 5.0, 10.0


def run() -> dict[str, Any]:
    rows = []
    with embedded_broker() as bootstrap, tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            topic = f"pacing-{rate:g}"
            summary = Path(folder) / f"{topic}.json"
            process = subprocess.Popen(
                [
                    *(BIN / "ray-pipeline", "generate", "--bootstrap-servers", bootstrap, "--rate", str(rate)),
                    *(
                        "--duration",
                        str(SETTLE_S + SPAN_S + 5),
                        "--ratings-topic",
                        topic,
                        "--progress-topic",
                        f"{topic}.p",
                    ),
                    *("--state-dir", folder, "--summary-json", summary),
                ],
                stdout=subprocess.DEVNULL,
            )
            sent = _sample(bootstrap, f"{topic}.p")
            process.wait(120)
            delivered = json.loads(summary.read_text())["delivered"]
            assert delivered == count_records(bootstrap, topic).total
            rows.append({"target": rate, "delivered": round(sent, 2), "off_percent": round(100 * (sent / rate - 1), 2)})
            print(rows[-1], flush=True)
    return {"span_s": SPAN_S, "rows": rows}


def _sample(bootstrap: str, topic: str) -> float:
    """Ratings a second over the span, from the shards' own progress records."""

    def progress() -> tuple[float, int]:
        try:
            records = read_compacted(bootstrap, topic)
        except Exception:  # noqa: BLE001 - the topic is still to be made
            return 0.0, 0
        shards = [r for key, r in records.items() if key.startswith("shard/")]
        return max((r["committed_ms"] for r in shards), default=0) / 1000, sum(r["next_index"] for r in shards)

    while progress()[1] == 0:
        time.sleep(0.2)
    time.sleep(SETTLE_S)
    first = progress()
    time.sleep(SPAN_S)
    last = progress()
    return (last[1] - first[1]) / (last[0] - first[0])
