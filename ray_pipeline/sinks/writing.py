"""Writes a run to a file or a pipe."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError, DeliveryError
from ray_pipeline.formats.mapped import json_format
from ray_pipeline.generator.plan import NEVER_MS
from ray_pipeline.sinks.files import whole_file
from ray_pipeline.sinks.merged import MergedStream
from ray_pipeline.sinks.writers import LineWriter, ParquetWriter, PieceWriter

__all__ = ["SinkSummary", "write_ratings"]

_TICK_S = 0.01
_LONGEST_WAIT_S = 0.25


@dataclass(frozen=True, slots=True)
class SinkSummary:
    """What was written.

    Attributes:
        requested: ratings asked for; None = until stopped.
        delivered: ratings written.
        sink: ``stdout``, ``ndjson`` or ``parquet``.
        output: the file; None for ``stdout``.
        duration_s: from the start to the end, seconds.
    """

    requested: int | None
    delivered: int
    sink: str
    output: str | None
    duration_s: float

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def write_ratings(
    settings: Settings,
    stdout: BinaryIO | None = None,
    stop: threading.Event | None = None,
    clock: Clock | None = None,
) -> SinkSummary:
    """Write the ratings of a run to the sink that the settings name. Blocks until its end.

    Args:
        settings: all settings; ``sink`` is not ``kafka``.
        stdout: where sink ``stdout`` writes.
        stop: ends it early.
        clock: tells the time.

    Raises:
        ConfigurationError: the file exists, its folder cannot be written to, or the sink is ``kafka``.
        DeliveryError: writing failed or was stopped, so that there is no file; or the reader of the pipe went away before a
            bounded run had ended.
    """
    if settings.sink == "kafka":
        raise ConfigurationError(problem="sink=kafka is no file", fix="Set sink to stdout, ndjson or parquet")
    began, clock, stop = time.monotonic(), clock or SystemClock(), stop or threading.Event()
    with _failures_named(settings), _opened(settings, stdout) as stream:
        merged = MergedStream(settings, clock)
        to_parquet = settings.sink == "parquet"
        writer: PieceWriter = ParquetWriter(stream) if to_parquet else LineWriter(stream, json_format(settings))
        with contextlib.closing(writer):
            written = _copy(merged, writer, stop, clock, paced=_is_paced(settings))
        if settings.sink != "stdout" and written != merged.requested:
            raise DeliveryError(
                problem=f"stopped after {written:,} of {merged.requested:,} ratings: {settings.output} was not made"
            )
    output = None if settings.output is None else str(settings.output)
    duration_s = round(time.monotonic() - began, 3)
    return SinkSummary(merged.requested, written, settings.sink, output, duration_s)


def _is_paced(settings: Settings) -> bool:
    """A pipe without a start time is a live stream; what has a start time, and a file, is history and written at once."""
    return settings.sink == "stdout" and settings.start_time_ms is None


def _copy(merged: MergedStream, writer: PieceWriter, stop: threading.Event, clock: Clock, *, paced: bool) -> int:
    """Write until the end, or until it is stopped; returns how many ratings were written."""
    written = 0
    try:
        while not stop.is_set() and (due_ms := merged.next_due_ms()) < NEVER_MS:
            now_ms = merged.event_now_ms(clock.now_ms())
            if paced and due_ms > now_ms:
                clock.wait(stop, min(max(_TICK_S, (due_ms - now_ms) / 1000), _LONGEST_WAIT_S))
                continue
            piece = merged.take(now_ms if paced else None)
            writer.write(piece)
            written += len(piece)
    except BrokenPipeError:
        if merged.requested is not None:  # a stream without end ends when nobody reads it any more
            raise DeliveryError(
                problem=f"the reader of the pipe went away after {written:,} of {merged.requested:,} ratings"
            ) from None
    return written


@contextlib.contextmanager
def _opened(settings: Settings, stdout: BinaryIO | None) -> Iterator[BinaryIO]:
    if settings.sink == "stdout":
        assert stdout is not None
        yield stdout
        return
    assert settings.output is not None
    with whole_file(settings.output) as stream:
        yield stream


@contextlib.contextmanager
def _failures_named(settings: Settings) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = settings.output or "stdout"
        raise DeliveryError(
            problem=f"{where} could not be written: {error.strerror}", fix="Free space, or name another --output"
        ) from None
