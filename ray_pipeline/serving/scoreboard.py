"""The scoreboard over HTTP: predictions in, scores out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException, Request

from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.serving.predictions import PredictionQueue, QueueFull
from ray_pipeline.truth.scoring import InvalidPrediction, parse_prediction

__all__ = ["scoreboard_routes"]

_AT_ONCE_MOST = 10_000
_EXAMPLE = {"userId": 116483, "movieId": 24424, "prediction": 3.4, "timestamp": 1762796864000, "model": "mine"}


def scoreboard_routes(store: MetricsStore, predictions: PredictionQueue, admit: Callable[[Request], None]) -> APIRouter:
    """``GET /predictions/scores`` and ``POST /predictions``.

    Args:
        store: has the scores.
        predictions: takes what is posted.
        admit: raises where a request may not change anything.
    """
    routes = APIRouter(prefix="/predictions", tags=["predictions"])

    @routes.get("/scores")
    def scores() -> dict[str, Any]:
        """Each model's errors against observed ratings and against the truth, beside the best possible and two baselines."""
        found = store.scores()
        status = "ok" if found["models"] else "no data yet"
        return {"status": status, **found, "posted": {"waiting": predictions.waiting(), "lost": predictions.lost}}

    @routes.post("", status_code=202)
    async def predict(request: Request, body: Annotated[Any, Body(examples=[_EXAMPLE, [_EXAMPLE]])]) -> dict[str, Any]:
        """Hand in a prediction, or a list of them: all are accepted, or none."""
        admit(request)
        found = body if isinstance(body, list) else [body]
        if len(found) > _AT_ONCE_MOST:
            raise HTTPException(422, f"{len(found):,} predictions at once, {_AT_ONCE_MOST:,} at most")
        accepted = []
        for number, prediction in enumerate(found):
            try:
                accepted.append(parse_prediction(prediction))
            except InvalidPrediction as error:
                raise HTTPException(422, f"prediction {number}: {error}") from None
        try:
            predictions.put(accepted)
        except QueueFull as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from None
        return {"accepted": len(accepted)}

    return routes
