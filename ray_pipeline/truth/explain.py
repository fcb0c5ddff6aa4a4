"""Where one rating comes from, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.config import Settings
from ray_pipeline.errors import UncheckedError
from ray_pipeline.events import Fault
from ray_pipeline.generator.plan import NEVER_MS
from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.model.faults import Fates
from ray_pipeline.truth.replay import ShardReplay
from ray_pipeline.windows.spec import WindowSpec, iso_ms

__all__ = ["explain", "fault_of"]


def explain(
    replay: ShardReplay, index: int, settings: Settings, catalogue: Catalogue, specs: Sequence[WindowSpec]
) -> dict[str, Any]:
    """Explain a rating.

    Args:
        replay: its shard.
        index: its index, ≥ 0.
        settings: the run's.
        catalogue: titles and genres.
        specs: the window kinds.

    Returns:
        ``partition``, ``index``, ``key``, ``value``, ``sent`` (whether the shard says that it has sent it); ``user``, ``movie``
        (ids, biases in stars, title and genres, the user's scale, which the movie's bias, factors and noise are times already);
        ``factors`` (both vectors, scaled so that their product is in stars); ``score`` (mean, user_bias, movie_bias,
        dot_product, drift, noise, raw, in stars); ``rounding`` (``step``, the user's, 0.5 or 1, ``half_star``, or whole one,
        nearest to the raw score, ``clipped``, ``rating``); ``attack`` that it is of, None as a rule: its ``text`` in the settings,
        and whether it is ``camouflage``, which follows the score, or else does not; ``time`` (``event_time``, ``timestamp``,
        ``due``, ``rate`` in force); ``windows`` it belongs to; ``fault``: what is wrong with it on purpose, see
        :func:`fault_of`; None when nothing is.

    Raises:
        UncheckedError: the plan does not reach the index.
    """
    due_ms = replay.due_ms(index)
    if due_ms >= NEVER_MS:
        raise UncheckedError(
            problem=f"rating {index:,} of partition {replay.partition} has no time: the plan ends before it",
            fix=f"The shard has sent {replay.progress.next_index:,} so far: give an index below that",
        )
    events, fates = replay.events(index, 1), replay.fates(index, 1)
    at_ms = int(events.timestamps_ms[0])
    parts = replay.model.parts(index if fates is None else int(fates.sources[0]))
    movie_id, half = int(events.movie_ids[0]), int(events.half_stars[0])
    place = int(catalogue.index_of(events.movie_ids)[0])
    nearest, value = parts.nearest_step, encode_values(events)[0]
    taken = replay.valid is None or events.faults is None or not replay.valid.rejects[events.faults[0]]
    return {
        "partition": replay.partition,
        "index": index,
        "sent": index < replay.progress.next_index,
        "key": encode_keys(events)[0].decode(),
        "value": None if value is None else value.decode(),
        "fault": None if fates is None else fault_of(replay, fates),
        "user": {
            "userId": int(events.user_ids[0]),
            "bias": _stars(parts.user_bias),
            "scale": _stars(parts.user_scale),
        },
        "movie": {
            "movieId": movie_id,
            "title": catalogue.titles[place],
            "genres": list(catalogue.genres[place]),
            "bias": _stars(parts.movie_bias),
        },
        "factors": {
            "user": [_stars(x) for x in parts.user_factors.tolist()],
            "movie": [_stars(x) for x in parts.movie_factors.tolist()],
        },
        "score": {
            "mean": settings.mean_rating,
            "user_bias": _stars(parts.user_bias),
            "movie_bias": _stars(parts.movie_bias),
            "dot_product": _stars(parts.dot_product),
            "drift": _stars(parts.drift),
            "noise": _stars(parts.noise),
            "raw": _stars(parts.score),
        },
        "rounding": {
            "step": parts.step,
            "half_star": nearest,
            "clipped": nearest != half / 2 and not parts.hit,
            "rating": half / 2,
        },
        "attack": None
        if parts.attack is None
        else {"text": settings.attack[parts.attack], "camouflage": not parts.hit},
        "time": {
            "event_time": iso_ms(at_ms),
            "timestamp": at_ms,
            "due": iso_ms(due_ms),
            "rate": replay.rate_at(due_ms),
        },
        "windows": [
            {
                "window_type": spec.name,
                "window_start": iso_ms(start),
                "window_end": iso_ms(start + spec.size_ms),
            }
            for spec in specs
            for start in _starts(spec, at_ms)
            if taken
        ],
    }


def fault_of(replay: ShardReplay, fates: Fates) -> dict[str, Any] | None:
    """What is wrong with a record on purpose: ``kind``, ``lateness_ms`` (event time before it is due), ``repeats`` (an index).

    Args:
        replay: its shard.
        fates: of this one record.

    Returns:
        None when nothing is wrong with it and its shard's clock is right.
    """
    kind, source = Fault(int(fates.faults[0])), int(fates.sources[0])
    lateness_ms = int(fates.due_ms[0] - fates.times_ms[0])
    if kind is Fault.NONE and not lateness_ms:
        return None
    return {
        "kind": "clock_skew" if kind is Fault.NONE else kind.name.lower(),
        "lateness_ms": lateness_ms,
        "repeats": source if source != fates.first else None,
        "rejected": replay.valid is not None and bool(replay.valid.rejects[kind]),
    }


def _starts(spec: WindowSpec, at_ms: int) -> list[int]:
    """Starts of the windows that hold a time, ascending."""
    newest = at_ms - at_ms % spec.slide_ms
    return list(range(newest + spec.slide_ms - spec.size_ms, newest + 1, spec.slide_ms))


def _stars(value: float) -> float:
    return round(float(value), 6)
