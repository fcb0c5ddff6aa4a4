"""Ratings from outside over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, HTTPException, Request

from ray_pipeline.clock import Clock
from ray_pipeline.codec import InvalidRating, check_fields
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.serving.outside import OutsideQueue
from ray_pipeline.serving.predictions import QueueFull

__all__ = ["outside_routes"]

_AT_ONCE_MOST = 10_000
_AHEAD_MS = 5_000
"""A time that lies further ahead would move the watermark past ratings of the shards that are still to come."""
_USERS_MOST = 2**53
_EXAMPLE = {"userId": 116483, "movieId": 24424, "rating": 3.5, "timestamp": 1762796864000}


def outside_routes(
    store: MetricsStore, queue: OutsideQueue, catalogue: Catalogue, clock: Clock, admit: Callable[[Request], None]
) -> APIRouter:
    """``POST /ratings`` and ``GET /ratings/outside``.

    Args:
        store: has what was delivered, and the event clock.
        queue: takes what is posted.
        catalogue: the movies there are.
        clock: tells the time.
        admit: raises where a request may not change anything.
    """
    routes = APIRouter(prefix="/ratings", tags=["ratings"])

    @routes.get("/outside")
    def outside() -> dict[str, Any]:
        """How many ratings from outside are in Kafka, by partition; how many wait, and were lost, of those that were posted here."""
        partitions = store.outside()
        posted = {"waiting": queue.waiting(), "delivered": queue.delivered, "lost": queue.lost}
        return {"total": sum(partitions.values()), "partitions": partitions, "posted": posted}

    @routes.post("", status_code=202)
    async def rate(request: Request, body: Annotated[Any, Body(examples=[_EXAMPLE, [_EXAMPLE]])]) -> dict[str, Any]:
        """Hand in a rating, or a list of them: all are accepted, or none. They are written beside those of the shards."""
        admit(request)
        found = body if isinstance(body, list) else [body]
        if len(found) > _AT_ONCE_MOST:
            raise HTTPException(422, f"{len(found):,} ratings at once, {_AT_ONCE_MOST:,} at most")
        now_ms = clock.now_ms() + int(store.generator(clock.now_ms()).get("clock_offset_ms", 0))
        accepted = []
        for number, rating in enumerate(found):
            try:
                accepted.append(_checked(rating, catalogue, now_ms))
            except InvalidRating as error:
                raise HTTPException(422, f"rating {number}: {error}") from None
        try:
            queue.put(accepted)
        except QueueFull as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from None
        return {"accepted": len(accepted)}

    return routes


def _checked(rating: Any, catalogue: Catalogue, now_ms: int) -> dict[str, Any]:
    """The four fields; without a time, it is now."""
    if isinstance(rating, dict):
        rating = {"timestamp": now_ms, **rating}
        unknown = sorted(rating.keys() - _EXAMPLE.keys())
        if unknown:
            raise InvalidRating(f"field {unknown[0][:50]!r} is unknown: there are {', '.join(_EXAMPLE)}")
    found = check_fields(rating)
    if found["userId"] >= _USERS_MOST:
        raise InvalidRating(f"userId must be below {_USERS_MOST}")
    if found["movieId"] >= _USERS_MOST or int(catalogue.index_of(np.array([found["movieId"]], np.int64))[0]) < 0:
        raise InvalidRating(f"movieId {found['movieId']} is not in the catalogue")
    if found["timestamp"] > now_ms + _AHEAD_MS:
        raise InvalidRating(f"timestamp is more than {_AHEAD_MS // 1000} s ahead of the event clock, {now_ms}")
    return found
