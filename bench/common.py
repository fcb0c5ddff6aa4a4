"""What the benchmarks share: a broker, a pipeline, child processes with their CPU time, and the results file."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from ray_pipeline.config import load_settings
from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.client import make_admin
from ray_pipeline.kafka.read import count_records
from ray_pipeline.kafka.topics import ensure_topics

BIN = Path(sys.executable).parent
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@contextlib.contextmanager
def embedded_broker() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        broker = EmbeddedBroker(Path(folder))
        broker.start()
        try:
            yield broker.bootstrap_servers
        finally:
            broker.stop()


def alternated(ways: Mapping[str, Callable[[str, str], Row]], rounds: int) -> dict[str, list[Row]]:
    """Rows of each way of sending, by name: every way once a round, each time another one first, all on one broker.

    A way is given the broker and a new topic, and says in its row ``sent``; what arrived is counted ``read_committed``.
    """
    rows: dict[str, list[Row]] = {name: [] for name in ways}
    with embedded_broker() as bootstrap:
        admin = make_admin(bootstrap)
        for number in range(rounds):
            names = list(ways)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                topic = f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}-{number}"
                ensure_topics(load_settings(ratings_topic=topic, progress_topic=f"{topic}.progress"), bootstrap)
                row = ways[name](bootstrap, topic)
                row["counted"] = count_records(bootstrap, topic).total
                assert row["counted"] == row["sent"], (name, row)
                rows[name].append(row)
                for done in admin.delete_topics([topic, f"{topic}.progress"]).values():
                    done.result(15)
                print(number, name, row, flush=True)
    return rows


def ratio(rows: dict[str, list[Row]], name: str, other: str) -> dict[str, float]:
    """How many times as fast one way was as another, round by round: median, least and most."""
    found = [a["rate"] / b["rate"] for a, b in zip(rows[name], rows[other], strict=True)]
    return {"median": round(statistics.median(found), 2), "min": round(min(found), 2), "max": round(max(found), 2)}


def medians(rows: dict[str, list[Row]]) -> dict[str, dict[str, Any]]:
    """Of each way: ratings per second and CPU µs a rating, and the rounds they are the medians of."""
    return {
        name: {
            "ratings_per_s": round(median(found, "rate")),
            "cpu_us_each": round(median(found, "cpu_us"), 2),
            "rounds": found,
        }
        for name, found in rows.items()
    }


@contextlib.contextmanager
def pipeline(*flags: str) -> Iterator[dict[str, Any]]:
    """``ray-pipeline run`` with flags; yields what it wrote down of itself, and ends it in order."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [BIN / "ray-pipeline", "run", "--state-dir", folder, "--api-port", "0", "--ui-port", "0", *flags],
            stdout=subprocess.DEVNULL,
        )
        try:
            file = Path(folder) / "runs" / f"{process.pid}.json"
            wait_for(lambda: file.is_file() or process.poll() is not None, 180)
            info: dict[str, Any] = json.loads(file.read_text())
            yield {**info, "state_dir": folder}
        finally:
            process.terminate()
            process.wait(180)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


def post(url: str, **fields: Any) -> Any:
    body = json.dumps(fields).encode() if fields else b""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def counted_to_the_last(info: dict[str, Any]) -> dict[str, int]:
    """Pause a pipeline, let it read all there is; what was sent, what is in Kafka, and what the windows counted, which agree."""
    api = info["urls"]["api"]
    assert post(f"{api}/control/rate", rate=100.0)["applied"]
    wait_for(lambda: get(f"{api}/metrics/summary")["job"]["lag"] < 500, 300)
    assert post(f"{api}/control/pause")["applied"]

    def settled() -> dict[str, int] | None:
        end = get(f"{api}/metrics/summary")
        job, sent = end["job"], end["generator"]["delivered_total"]
        found = {"sent": sent, "counted": job["counted"], "late_dropped": job["late_dropped"]}
        return found if sent == job["counted"] + job["late_dropped"] else None

    found: dict[str, int] = wait_for(settled, 60)
    found["delivered"] = count_records(info["bootstrap"], "ratings").total
    assert found["delivered"] == found["sent"], found
    return found


def wait_for(reached: Callable[[], Any], deadline_s: float) -> Any:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        found = reached()
        if found:
            return found
        time.sleep(0.2)
    raise TimeoutError(f"not within {deadline_s} s")


def child(command: list[str], folder: Path | None = None) -> tuple[str, float, float]:
    """Run a command, in the project of another folder if one is given; its output, wall seconds, CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(folder)} if folder else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder, env=environment)
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def goal(what: str, found: float, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    """One line of the table that :func:`save` prints: what was found beside what it should be."""
    met = (least is None or found >= least) and (most is None or found <= most)
    wanted = f"≥ {least:,}" if least is not None else f"≤ {most:,}"
    return {"what": what, "goal": wanted, "found": found, "met": met}


def median(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.median(float(row[name]) for row in rows)


def save(name: str, result: dict[str, Any]) -> None:
    """Print the result and write it down with where it was measured."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "benchmark": name,
        "commit": commit,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "system": platform.platform(),
        },
        "versions": {
            p: version(p) for p in ("ray-pipeline", "ray", "raydp", "pyspark", "confluent-kafka", "numpy", "pyarrow")
        },
        "result": result,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    for title, rows in result.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            Console().print(_table(name if title == "goals" else f"{name}: {title}", rows))
    print(f"written to {path}", flush=True)


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    """What is in every row, as a table; what is no single value is left to the JSON."""
    names = [name for name, value in rows[0].items() if not isinstance(value, (dict, list))]
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(_shown(row[name]) for name in names))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)
