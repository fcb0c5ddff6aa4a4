"""Command to first window, by stage; archives cached, state fresh."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bench.common import BIN, child, goal, median

ROUNDS = 3


def run() -> dict[str, Any]:
    rows = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            summary = Path(folder) / "summary.json"
            flags = ("--ratings", "500", "--api-port", "0", "--ui-port", "0", "--state-dir", folder)
            child([str(BIN / "ray-pipeline"), "run", *flags, "--summary-json", str(summary)])
            found = json.loads(summary.read_text())
            assert found["requested"] == found["delivered"] == found["counted"] == 500
            rows.append({"first_window_s": found["first_window_s"], **found["stages"]})
            print(rows[-1], flush=True)
    return {"goals": [goal("command to first window, s", median(rows, "first_window_s"), most=30)], "rounds": rows}
