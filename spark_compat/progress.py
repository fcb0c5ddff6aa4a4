"""What a streaming query says of its last micro-batch, as plain numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

__all__ = ["BatchProgress", "planned_progress", "read_progress"]


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """One micro-batch.

    Attributes:
        batch: its number; -1 before the first.
        watermark_ms: watermark in force, epoch milliseconds; None before the first event.
        input_rows: rows read.
        input_rate: rows per second that came in.
        processed_rate: rows per second that were worked off.
        duration_ms: length of the batch.
        durations_ms: by phase.
        state_bytes: memory of the state.
        dropped_groups: groups (not rows) dropped as late.
        end_offsets: where the batch ended, by partition.
    """

    batch: int = -1
    watermark_ms: int | None = None
    input_rows: int = 0
    input_rate: float = 0.0
    processed_rate: float = 0.0
    duration_ms: int = 0
    durations_ms: dict[str, int] = field(default_factory=dict)
    state_bytes: int = 0
    dropped_groups: int = 0
    end_offsets: dict[int, int] = field(default_factory=dict)


def planned_progress(batch: int, text: str) -> BatchProgress:
    """What a checkpoint knows of a micro-batch of a query that reads one Kafka topic: a query that goes on from it says nothing yet.

    Args:
        batch: its number.
        text: of its file in folder ``offsets``.
    """
    _, plan, ends = text.splitlines()[:3]
    watermark_ms = int(json.loads(plan)["batchWatermarkMs"])
    return BatchProgress(batch=batch, watermark_ms=watermark_ms or None, end_offsets=_offsets(ends))


def read_progress(query: Any) -> BatchProgress | None:
    """The last micro-batch of a ``StreamingQuery`` that reads one Kafka topic; None before its first has ended."""
    last = query._jsq.lastProgress()
    if last is None:
        return None
    said: dict[str, Any] = json.loads(last.json())
    source = said["sources"][0]
    states = said.get("stateOperators", [])
    watermark = said.get("eventTime", {}).get("watermark")
    watermark_ms = round(datetime.fromisoformat(watermark).timestamp() * 1000) if watermark else 0
    return BatchProgress(
        batch=int(said["batchId"]),
        watermark_ms=watermark_ms or None,
        input_rows=int(said.get("numInputRows") or 0),
        input_rate=_number(said.get("inputRowsPerSecond")),
        processed_rate=_number(said.get("processedRowsPerSecond")),
        duration_ms=int(said.get("durationMs", {}).get("triggerExecution", 0)),
        durations_ms={name: int(ms) for name, ms in said.get("durationMs", {}).items()},
        state_bytes=sum(int(s["memoryUsedBytes"]) for s in states),
        dropped_groups=sum(int(s["numRowsDroppedByWatermark"]) for s in states),
        end_offsets=_offsets(source.get("endOffset")),
    )


def _offsets(text: Any) -> dict[int, int]:
    """``{"topic":{"0":7}}``, as text or parsed → ``{0: 7}``."""
    by_topic = json.loads(text) if isinstance(text, str) else (text or {})
    return {int(p): int(offset) for offsets in by_topic.values() for p, offset in offsets.items()}


def _number(value: Any) -> float:
    number = float(value or 0.0)
    return number if number == number and abs(number) != float("inf") else 0.0
