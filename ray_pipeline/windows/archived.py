"""Windows as Parquet by date and hour: one small file an hour, written anew when more of its windows are final."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_pipeline.kafka.read import read_topic_from
from ray_pipeline.windows.spec import WindowSpec, epoch_ms, iso_ms
from spark_compat.hadoop import read_text, replace

__all__ = ["WINDOWS", "WindowsArchive"]

WINDOWS = "windows"
"""Folder of the windows in an archive."""
_STATE = "windows.json"
_HOUR_MS = 3_600_000
_SCHEMA = pa.schema(
    [
        ("window_type", pa.string()),
        ("window_start", pa.timestamp("ms", "UTC")),
        ("window_end", pa.timestamp("ms", "UTC")),
        ("count", pa.int64()),
        ("avg_rating", pa.float64()),
        ("p50", pa.float64()),
        ("p95", pa.float64()),
        ("histogram", pa.list_(pa.int64())),
        ("final", pa.bool_()),
    ]
)


@dataclass
class _Hour:
    """The windows that start in an hour, by key; ``first`` = offset of the first record of any of them."""

    first: int
    windows: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: int = 0


class WindowsArchive:
    """Follows the metrics topic.

    Args:
        spark: the session, for its file systems.
        bootstrap: brokers, HOST:PORT[,…].
        topic: the metrics topic.
        uri: the archive, a Hadoop URI.
        checkpoint: where it is noted how far the archive is, a Hadoop URI.
        specs: the window kinds.
        watermark_ms: tells up to which end windows are final, and in the topic; epoch milliseconds.
    """

    def __init__(
        self,
        spark: Any,
        bootstrap: str,
        topic: str,
        uri: str,
        checkpoint: str,
        specs: tuple[WindowSpec, ...],
        watermark_ms: Callable[[], int],
    ) -> None:
        self._spark = spark
        self._bootstrap = bootstrap
        self._topic = topic
        self._uri = uri.rstrip("/")
        self._state = f"{checkpoint.rstrip('/')}/{_STATE}"
        self._longest_ms = max(spec.size_ms for spec in specs)
        self._watermark_ms = watermark_ms
        self._hours: dict[int, _Hour] = {}
        said = json.loads(read_text(spark, self._state) or '{"offset":0,"through_ms":0}')
        self._next, self._through_ms = int(said["offset"]), int(said["through_ms"])

    def write(self, *, all_of_them: bool = False) -> None:
        """Write the hours in which more windows are final than at the last time.

        Args:
            all_of_them: also those that are not final yet, as they are now; they are marked so.

        Raises:
            OSError: the archive cannot be written.
            BrokerUnavailableError: the topic cannot be read.
        """
        watermark_ms = self._watermark_ms()  # before the topic is read, so that what is final is in it
        self._read()
        for start_ms, hour in sorted(self._hours.items()):
            final = sum(epoch_ms(w["window_end"]) <= watermark_ms for w in hour.windows.values())
            if final > hour.written or all_of_them:
                self._write(start_ms, hour, watermark_ms, all_of_them)
            if self._over(start_ms, watermark_ms):
                del self._hours[start_ms]
        self._through_ms = max(self._through_ms, watermark_ms)
        offset = min([self._next, *(hour.first for hour in self._hours.values())])
        replace(self._spark, self._state, json.dumps({"offset": offset, "through_ms": self._through_ms}).encode())

    # -- inside

    def _read(self) -> None:
        for record in read_topic_from(self._bootstrap, self._topic, 0, self._next):
            self._next = record.offset + 1
            if record.value is None or record.key is None or not record.key.endswith("|total"):
                continue
            window = json.loads(record.value)
            start_ms = epoch_ms(window["window_start"]) // _HOUR_MS * _HOUR_MS
            if not self._over(start_ms, self._through_ms):
                hour = self._hours.setdefault(start_ms, _Hour(record.offset))
                hour.windows[record.key] = window

    def _over(self, start_ms: int, watermark_ms: int) -> bool:
        """Whether every window that starts in an hour is final."""
        return start_ms + _HOUR_MS + self._longest_ms <= watermark_ms

    def _write(self, start_ms: int, hour: _Hour, watermark_ms: int, all_of_them: bool) -> None:
        rows = [
            {
                **{name: window[name] for name in ("window_type", "count", "avg_rating", "p50", "p95", "histogram")},
                "window_start": epoch_ms(window["window_start"]),
                "window_end": epoch_ms(window["window_end"]),
                "final": epoch_ms(window["window_end"]) <= watermark_ms,
            }
            for window in hour.windows.values()
        ]
        hour.written = sum(row["final"] for row in rows)
        rows = [row for row in rows if all_of_them or row["final"]]
        rows.sort(key=lambda row: (row["window_start"], row["window_end"]))
        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), content)
        replace(self._spark, f"{self._uri}/{WINDOWS}/{_folder(start_ms)}/windows.parquet", content.getvalue())


def _folder(start_ms: int) -> str:
    text = iso_ms(start_ms)
    return f"date={text[:10]}/hour={text[11:13]}"
