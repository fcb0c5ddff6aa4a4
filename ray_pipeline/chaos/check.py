"""What a run left in its topics, against the ratings made again and the windows counted from them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.codec import InvalidRating, decode_value
from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.events import EventBatch
from ray_pipeline.kafka.read import Record, read_compacted, read_topic
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.truth.replay import ShardReplay, build_models, published_settings
from ray_pipeline.windows.spec import WindowSpec, iso_ms, window_specs

__all__ = ["check_run"]

_BLOCK = 65_536
_LISTED = 20


def check_run(settings: Settings, bootstrap: str) -> dict[str, Any]:
    """Compare a run that has ended with what it must have left.

    Args:
        settings: the run's settings.
        bootstrap: brokers, HOST:PORT[,…].

    Returns:
        ``verdict``, ``records``, ``windows``, ``findings``, as the audit has them.
    """
    catalogue = load_catalogue(settings)
    said = read_compacted(bootstrap, settings.progress_topic)
    settings = published_settings(settings, said["run"], catalogue)
    models = build_models(settings, catalogue, range(settings.partitions))
    replays = {
        p: ShardReplay(models[p], ShardProgress.from_json(json.dumps(said[f"shard/{p}"]).encode()))
        for p in range(settings.partitions)
    }
    walks = {p: _Walk(replay) for p, replay in replays.items()}
    for record in read_topic(bootstrap, settings.ratings_topic):
        walks[record.partition].take(record)
    findings: list[dict[str, Any]] = []
    counts = dict.fromkeys(("expected", "found", "missing", "repeated", "altered", "out_of_order", "foreign"), 0)
    for partition, walk in walks.items():
        for name, count in walk.result().items():
            counts[name] += count
        findings += [{"partition": partition, **finding} for finding in walk.findings]
    windows, wrong = _windows(settings, bootstrap, replays)
    bad = any(counts[name] for name in ("missing", "repeated", "altered", "out_of_order", "foreign"))
    return {
        "verdict": "disagreed" if bad or windows["wrong"] else "agreed",
        "records": counts,
        "windows": windows,
        "findings": (findings + wrong)[:_LISTED],
    }


def _rows(batch: EventBatch) -> list[tuple[int, int, int, int]]:
    return list(
        zip(
            batch.user_ids.tolist(),
            batch.movie_ids.tolist(),
            batch.half_stars.tolist(),
            batch.timestamps_ms.tolist(),
            strict=True,
        )
    )


def _blocks(replay: ShardReplay) -> Iterator[list[tuple[int, int, int, int]]]:
    end = replay.progress.next_index
    for first in range(0, end, _BLOCK):
        yield _rows(replay.events(first, min(_BLOCK, end - first)))


class _Walk:
    """One partition, record by record."""

    def __init__(self, replay: ShardReplay) -> None:
        self.findings: list[dict[str, Any]] = []
        self._replay = replay
        self._truth = list(itertools.chain.from_iterable(_blocks(replay)))
        self._index_of = {row: n for n, row in enumerate(self._truth)}
        self._seen = np.zeros(len(self._truth), np.int64)
        self._next = 0
        self._counts = {"found": 0, "out_of_order": 0, "foreign": 0}

    def take(self, record: Record) -> None:
        self._counts["found"] += 1
        try:
            said = decode_value(record.value or b"")
            row = (int(said["userId"]), int(said["movieId"]), round(said["rating"] * 2), int(said["timestamp"]))
        except InvalidRating:
            row = (-1, -1, -1, -1)
        index = self._index_of.get(row)
        if index is None:
            self._counts["foreign"] += 1
            self._find("foreign", record.offset, str(record.value)[:200])
            return
        if index != self._next and not self._seen[index]:
            self._counts["out_of_order"] += index < self._next
            self._find("gap", record.offset, f"index {index} where {self._next} was due")
        self._seen[index] += 1
        self._next = index + 1

    def result(self) -> dict[str, int]:
        missing = np.flatnonzero(self._seen == 0)
        if len(missing):
            self._find("missing", -1, f"{missing[:20].tolist()} of {len(missing)}")
        return {
            **self._counts,
            "expected": len(self._truth),
            "missing": len(missing),
            "repeated": int(np.maximum(self._seen - 1, 0).sum()),
            "altered": 0,
        }

    def _find(self, kind: str, offset: int, detail: str) -> None:
        if len(self.findings) < _LISTED:
            self.findings.append({"kind": kind, "offset": offset, "detail": detail})


def _windows(
    settings: Settings, bootstrap: str, replays: dict[int, ShardReplay]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Histogram of every window; what is short of it in tumbling windows must be what was dropped as late."""
    metrics = read_compacted(bootstrap, settings.metrics_topic)
    late = int(read_compacted(bootstrap, settings.job_topic)["job"]["late_dropped"])
    rows = np.array([row[2:] for replay in replays.values() for block in _blocks(replay) for row in block], np.int64)
    checked, short, wrong = 0, 0, []
    for spec in window_specs(settings):
        for start_ms, histogram in _histograms(spec, rows).items():
            checked += 1
            name = f"{spec.name}|{iso_ms(start_ms)}|total"
            found = np.array(metrics.get(name, {}).get("histogram", [0] * 10))
            if (found > histogram).any() or (found.sum() < histogram.sum() and not late):
                wrong.append(
                    {"kind": "window", "detail": f"{name}: {int(found.sum())} counted, {int(histogram.sum())} sent"}
                )
            elif spec.tumbling:
                short += int(histogram.sum() - found.sum())
    if short != late:
        wrong.append({"kind": "window", "detail": f"{short} ratings are in no tumbling window, {late} were late"})
    return {"checked": checked, "wrong": len(wrong), "late_dropped": late}, wrong


def _histograms(spec: WindowSpec, rows: npt.NDArray[np.int64]) -> dict[int, npt.NDArray[np.int64]]:
    found: dict[int, npt.NDArray[np.int64]] = {}
    for back in range(spec.size_ms // spec.slide_ms):
        starts = rows[:, 1] // spec.slide_ms * spec.slide_ms - back * spec.slide_ms
        keys, counts = np.unique(np.stack([starts, rows[:, 0]]), axis=1, return_counts=True)
        for start, star, count in zip(*keys.tolist(), counts.tolist(), strict=True):
            found.setdefault(start, np.zeros(10, np.int64))[star - 1] += count
    return found
