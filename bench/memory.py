"""Memory of 10 million users and 1 million movies, rank 20, on Ray: a generator of one actor beside one of four on the same node.

The movies' factors are in Ray's store, once a node; each actor holds the users of its own partitions. PSS counts a page that
several processes share once in all, so what four actors have together beside one shows what is shared and what is not.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bench.common import BIN, embedded_broker, wait_for
from ray_pipeline.errors import BrokerUnavailableError
from ray_pipeline.kafka.read import count_records, newest_of_key

USERS, MOVIES = 10_000_000, 1_000_000
ACTORS = (1, 4)
LOAD = ("--users", str(USERS), "--movies", str(MOVIES), "--rate", "10000", "--duration", "30")


def run() -> dict[str, Any]:
    with embedded_broker() as bootstrap:
        rows = {actors: _generate(bootstrap, actors) for actors in ACTORS}
    few, many = (rows[actors]["pss_mib"] for actors in ACTORS)
    return {
        "users": USERS,
        "movies": MOVIES,
        "mib_more_for_each_further_actor": round((many - few) / (ACTORS[1] - ACTORS[0])),
        "rows": {f"{actors} actors": row for actors, row in rows.items()},
    }


def _generate(bootstrap: str, actors: int) -> dict[str, Any]:
    """A generator on a Ray of its own; its actors' memory while all of them send."""
    topic = f"memory-{actors}"
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "summary.json"
        began = time.monotonic()
        process = subprocess.Popen(
            [
                *(BIN / "ray-pipeline", "generate", "--bootstrap-servers", bootstrap, *LOAD, "--actors", str(actors)),
                *("--ratings-topic", topic, "--progress-topic", f"{topic}.p"),
                *("--state-dir", folder, "--summary-json", summary),
            ],
            stdout=subprocess.DEVNULL,
        )
        wait_for(lambda: process.poll() is not None or _all_send(bootstrap, f"{topic}.p", actors), 300)
        ready_s = round(time.monotonic() - began, 1)
        found = [_memory_mib(p) for p in psutil.Process(process.pid).children(recursive=True) if _is_actor(p)]
        assert len(found) == actors, found
        assert process.wait(180) == 0
        sent = json.loads(summary.read_text())["delivered"]
        assert sent == count_records(bootstrap, topic).total
    row = {"all_send_after_s": ready_s, "pss_mib": round(sum(m["pss"] for m in found)), "actors": found, "sent": sent}
    print(actors, row, flush=True)
    return row


def _all_send(bootstrap: str, topic: str, actors: int) -> bool:
    try:
        value = newest_of_key(bootstrap, topic, "generator", 10.0, committed=False)
    except BrokerUnavailableError:
        return False  # the topic is still to be made
    said = json.loads(value) if value else {}
    return len(said.get("actors", [])) == actors and said["delivered"] > 0


def _is_actor(process: psutil.Process) -> bool:
    return "_WorkerActor" in " ".join(process.cmdline())


def _memory_mib(process: psutil.Process) -> dict[str, int]:
    memory = process.memory_full_info()
    return {name: round(getattr(memory, name) / 2**20) for name in ("rss", "pss", "uss", "shared")}
