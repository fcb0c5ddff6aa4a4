"""Windows in the archive: final ones, once each, whatever is begun again; archive and checkpoint belong together."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pyarrow.parquet as pq
import pytest

from ray_pipeline.errors import BrokerUnavailableError, ConfigurationError, StateMismatchError
from ray_pipeline.kafka.read import Record
from ray_pipeline.windows import archive, archived
from ray_pipeline.windows.archive import RatingsArchive, claim
from ray_pipeline.windows.archived import WindowsArchive
from ray_pipeline.windows.spec import WindowSpec, iso_ms

HOUR_MS = 3_600_000
T0 = 472_222 * HOUR_MS


class Files:
    """Small files by name, in place of Hadoop's."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def read_text(self, _: Any, name: str) -> str | None:
        return self.content[name].decode() if name in self.content else None

    def replace(self, _: Any, name: str, content: bytes) -> None:
        if name.startswith("file:///proc/"):
            raise OSError("Mkdirs failed")
        self.content[name] = content

    def exists(self, _: Any, name: str) -> bool:
        return any(known.startswith(f"{name}/") for known in self.content)

    def windows(self) -> list[tuple[int, int, bool]]:
        """(start in ms since T0, count, final) of all windows in the archive."""
        found = []
        for name, content in sorted(self.content.items()):
            if name.endswith(".parquet"):
                for row in pq.read_table(io.BytesIO(content)).to_pylist():
                    start_ms = round(row["window_start"].timestamp() * 1000)
                    assert f"date={iso_ms(start_ms)[:10]}/hour={iso_ms(start_ms)[11:13]}/" in name
                    found.append((start_ms - T0, row["count"], row["final"]))
        return found


class Topic:
    """The metrics topic, and the job's watermark."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.watermark_ms = 0

    def put(self, start_ms: int, count: int, kind: str = "total") -> None:
        window = {
            "window_start": iso_ms(T0 + start_ms),
            "window_end": iso_ms(T0 + start_ms + 60_000),
            "window_type": "tumbling_1min",
            "count": count,
            **{"avg_rating": 3.5, "p50": 3.5, "p95": 5.0, "histogram": [0] * 10},
        }
        key = f"tumbling_1min|{window['window_start']}|{kind}"
        self.records.append(Record("metrics", 0, len(self.records), key, json.dumps(window).encode(), 0))

    def read(self, _bootstrap: str, _topic: str, _partition: int, offset: int) -> list[Record]:
        return self.records[offset:]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    found = Files()
    for module, names in ((archived, ("read_text", "replace")), (archive, ("read_text", "replace", "exists"))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(found, name))
    return found


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> Topic:
    found = Topic()
    monkeypatch.setattr(archived, "read_topic_from", found.read)
    return found


def windows_archive(topic: Topic) -> WindowsArchive:
    specs = (WindowSpec(60_000, 60_000),)
    return WindowsArchive(None, "", "metrics", "a://x", "c://x", specs, lambda: topic.watermark_ms)


def test_final_windows_are_there_once_with_their_last_count_through_restarts(files: Files, topic: Topic) -> None:
    found = windows_archive(topic)
    topic.put(0, 5)
    topic.put(0, 5, kind="topn")
    found.write()
    assert files.windows() == []
    topic.put(0, 7)
    topic.put(60_000, 2)
    topic.watermark_ms = T0 + 60_000
    found.write()
    assert files.windows() == [(0, 7, True)]
    topic.put(60_000, 3)
    topic.put(HOUR_MS, 1)
    topic.watermark_ms = T0 + HOUR_MS + 60_000
    found.write()
    everything = [(0, 7, True), (60_000, 3, True), (HOUR_MS, 1, True)]
    assert files.windows() == everything
    # the first hour is over: a fresh start does not write it again from the part of the topic that it still reads
    topic.put(HOUR_MS + 120_000, 9)
    topic.watermark_ms += HOUR_MS
    again = windows_archive(topic)
    again.write()
    assert files.windows() == [*everything, (HOUR_MS + 120_000, 9, True)]
    offset = json.loads(files.content["c://x/windows.json"])["offset"]
    assert 0 < offset <= len(topic.records)


def test_the_end_of_a_run_has_open_windows_too_and_the_next_run_closes_them(files: Files, topic: Topic) -> None:
    topic.put(0, 5)
    topic.put(60_000, 2)
    topic.watermark_ms = T0 + 60_000
    windows_archive(topic).write(all_of_them=True)
    assert files.windows() == [(0, 5, True), (60_000, 2, False)]
    topic.put(60_000, 4)
    topic.watermark_ms = T0 + 120_000
    windows_archive(topic).write()
    assert files.windows() == [(0, 5, True), (60_000, 4, True)]


def test_an_archive_goes_with_the_checkpoint_it_was_begun_with(files: Files) -> None:
    claim(None, "a://x/", "c://x")
    claim(None, "a://x", "c://x")
    files.content["a://x/ratings/date=2026-01-01/hour=00/batch-000000000.parquet"] = b""
    claim(None, "a://x", "c://x")
    with pytest.raises(StateMismatchError, match="knows nothing of"):
        claim(None, "a://x", "c://other")
    with pytest.raises(StateMismatchError, match="is not where they are"):
        claim(None, "a://other", "c://x")
    with pytest.raises(ConfigurationError, match="cannot be written: Mkdirs failed"):
        claim(None, f"file://{Path('/proc/x')}", "c://third")


def test_a_batch_that_is_run_again_because_the_broker_was_away_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The query is started again with the same object; what it says of itself are the ratings of its batches, once each."""
    found_in: dict[str, int] = {}
    monkeypatch.setattr("pyspark.sql.Observation", lambda: SimpleNamespace(get=found_in))
    monkeypatch.setattr("pyspark.sql.functions", MagicMock())
    monkeypatch.setattr(archive, "valid", MagicMock())
    monkeypatch.setattr(archive, "list_files", lambda *_: [])
    monkeypatch.setattr(archive, "remove", lambda *_: None)
    then = MagicMock()
    found = RatingsArchive(None, "a://x", then)
    for batch, ratings, failures in ((3, 10, 2), (4, 0, 1), (5, 7, 1)):
        found_in["ratings"] = ratings
        then.side_effect = BrokerUnavailableError(problem="nobody answers")
        for _ in range(failures):
            with pytest.raises(BrokerUnavailableError):
                found(None, batch)
        then.side_effect = None
        found(None, batch)
    assert (found.ratings, found.batch) == (17, 5)
