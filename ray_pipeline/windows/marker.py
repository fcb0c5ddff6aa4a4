"""What a checkpoint was made for: a small file in it, so that no state is read as something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_pipeline.config import Settings

__all__ = ["MARKER", "marker_for", "marker_of", "mismatch", "shuffle_partitions", "way_to_clear"]

MARKER = "ray-pipeline.json"


def shuffle_partitions(settings: Settings) -> int:
    """Partitions of the state: fixed for the life of a checkpoint."""
    return max(2, settings.executors * settings.executor_cores)


def marker_for(settings: Settings) -> dict[str, Any]:
    """What the settings make of the state."""
    # without records that lie ahead on purpose the guard decides of nothing that anybody counts on
    guard = {"max_ahead_s": settings.guard_ms / 1000} if settings.future_share or settings.clock_skew else {}
    return {
        **guard,
        "layout": "panes",
        "ratings_topic": settings.ratings_topic,
        "tumbling_s": settings.tumbling_s,
        "sliding_s": settings.sliding_s,
        "slide_s": settings.slide_s,
        "watermark_s": settings.watermark_s,
        "partitions": settings.partitions,
        "shuffle_partitions": shuffle_partitions(settings),
    }


def marker_of(checkpoint: Path) -> str | None:
    """The marker's text in a checkpoint on a local path; None when there is none."""
    path = checkpoint / MARKER
    return path.read_text() if path.is_file() else None


def mismatch(settings: Settings, text: str) -> str | None:
    """The first difference between a marker and the settings; None when it is of them."""
    try:
        there = json.loads(text)
    except ValueError:
        return f"its file {MARKER} is cut off"
    return next(
        (
            f"{name} was {there.get(name)}, is {value}"
            for name, value in marker_for(settings).items()
            if there.get(name) != value
        ),
        None,
    )


def way_to_clear(settings: Settings) -> str:
    """How to be rid of the checkpoint of these settings: the end of a sentence on what to do."""
    if settings.checkpoint is not None:
        return f"remove {settings.checkpoint} (reset clears the state directory and topics alone)"
    elsewhere = (
        " (and --bootstrap-servers, unless the broker is that directory's own)" if settings.bootstrap_servers else ""
    )
    return f"clear checkpoint and topics with: ray-pipeline reset --state-dir {settings.state_dir}{elsewhere}"
