"""The HTTP API. Errors are JSON ``{"error": reason}``; an empty pipeline answers 200 and says "no data yet"."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
import threading
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from ray_pipeline.clock import Clock
from ray_pipeline.errors import ConfigurationError, PlanError, RayPipelineError, UncheckedError
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.model.catalogue import Catalogue
from ray_pipeline.rates.language import MOST_TEXT, parse_plan, tidy
from ray_pipeline.serving.control import Control
from ray_pipeline.serving.explanations import Explanations
from ray_pipeline.serving.feed import Feed
from ray_pipeline.serving.gate import ControlGate, Refused
from ray_pipeline.serving.outside import OutsideQueue
from ray_pipeline.serving.outside_routes import outside_routes
from ray_pipeline.serving.predictions import PredictionQueue
from ray_pipeline.serving.prometheus import make_registry
from ray_pipeline.serving.scoreboard import scoreboard_routes
from ray_pipeline.windows.spec import iso_ms

__all__ = ["make_api"]

_NO_DATA = "no data yet"
_STREAM_S = 1.0
_STREAM_QUIET_MS = 5_000
_STATUS_OF: dict[type[RayPipelineError], int] = {UncheckedError: 404, ConfigurationError: 409}
"""All others say that something is away that may come back: 503."""
_Place = Annotated[int, Path(ge=0, lt=2**53)]
_CSV_FIELDS = ("window_type", "window_start", "window_end", "count", "avg_rating", "p50", "p95", "final", "verdict")


class RateChange(BaseModel):
    """Body of ``POST /control/rate``."""

    rate: float = Field(gt=0, le=1e9, allow_inf_nan=False, description="ratings per second; fractions allowed")


class PlanChange(BaseModel):
    """Body of ``POST /control/plan``."""

    plan: str = Field(
        min_length=1, max_length=MOST_TEXT, description="rates over time, such as ramp(0..500, 10m) then 500"
    )


class ScaleChange(BaseModel):
    """Body of ``POST /control/scale``."""

    actors: int = Field(ge=1, le=10_000, description="generator actors; at most one a partition")


def make_api(
    store: MetricsStore,
    catalogue: Catalogue,
    feed: Feed,
    control: Control,
    gate: ControlGate,
    explanations: Explanations,
    top_n: int,
    clock: Clock,
    predictions: PredictionQueue,
    ending: threading.Event | None = None,
    *,
    outside: OutsideQueue,
) -> FastAPI:
    """The application.

    Args:
        store: the answers.
        catalogue: titles of movies.
        feed: the live tail.
        control: sends commands to the generator.
        gate: decides who may.
        explanations: tell where a rating comes from.
        top_n: movies kept in each window's top-N, the highest ``limit``.
        clock: tells the time.
        predictions: takes learners' predictions.
        ending: streams end when it is set; None = never.
        outside: takes ratings from outside.
    """
    app = FastAPIOffline(
        title="ray-pipeline",
        version=version("ray-pipeline"),
        description="Windows over a reproducible stream of movie ratings, and control of its generator.",
        redoc_url=None,
    )
    registry = make_registry(store, clock)
    types = store.window_types

    def known(window_type: str | None) -> str:
        name = window_type or types[0]
        if name not in types:
            raise HTTPException(422, f"window_type {name!r} is unknown: there are {', '.join(types)}")
        return name

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.get("/metrics/health", tags=["metrics"])
    def health() -> dict[str, Any]:
        """Whether the pipeline is well, and if not, why.

        ``windows``: how many have which verdict, and the first 20 wrong ones with what they must hold and what they hold.
        ``/metrics/history`` has every window.
        """
        now_ms = clock.now_ms()
        found = store.health(now_ms)
        return {
            "status": found.status,
            "kafka_connected": store.kafka_connected,
            "last_update": store.last_update(),
            "reasons": list(found.reasons),
            "stale_since": None if found.stale_since_ms is None else iso_ms(found.stale_since_ms),
            "windows": store.windows(now_ms),
        }

    @app.get("/metrics/verification", tags=["metrics"])
    def verification() -> dict[str, Any]:
        """Windows by verdict, expected against actual: how many are verified, pending, late by design, wrong, and which."""
        return store.verification(clock.now_ms())

    @app.get("/metrics/summary", tags=["metrics"])
    def summary() -> dict[str, Any]:
        """The current window of each type, and how generator and Spark job stand."""
        return store.summary(clock.now_ms())

    @app.get("/metrics/topn", tags=["metrics"])
    def topn(
        limit: int = Query(min(10, top_n), ge=1, le=top_n),
        window_type: str | None = None,
        window_start: str | None = None,
    ) -> dict[str, Any]:
        """The movies with the most ratings in a window (the current one by default), with count and mean."""
        name = known(window_type)
        record = store.topn(name, _parse_time("window_start", window_start))
        if record is None:
            return {"status": _NO_DATA, "window_type": name, "movies": []}
        movies = [
            {"rank": rank, "title": catalogue.title_of(movie["movieId"]), **movie}
            for rank, movie in enumerate(record["movies"][:limit], 1)
        ]
        return {"status": "ok", **_head(record), "movies": movies}

    @app.get("/metrics/genres", tags=["metrics"])
    def genres(window_type: str | None = None, window_start: str | None = None) -> dict[str, Any]:
        """Count and mean by genre in a window (the current one by default)."""
        name = known(window_type)
        record = store.genres(name, _parse_time("window_start", window_start))
        if record is None:
            return {"status": _NO_DATA, "window_type": name, "genres": []}
        return {"status": "ok", **_head(record), "genres": record["genres"]}

    @app.get("/metrics/history", tags=["metrics"], response_model=None)
    def history(
        window_type: str | None = None,
        from_: Annotated[str | None, Query(alias="from", description="ISO-8601; windows starting at or after")] = None,
        to: Annotated[str | None, Query(description="ISO-8601; windows starting before")] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1_000,
        format: Annotated[str, Query(pattern="^(json|csv)$")] = "json",
    ) -> dict[str, Any] | Response:
        """The last windows of a type, oldest first; also as CSV."""
        name = known(window_type)
        first, last = _parse_time("from", from_), _parse_time("to", to)
        if first is not None and last is not None and last <= first:
            raise HTTPException(422, "to must be after from")
        windows = store.history(name, first, last, limit, clock.now_ms())
        if format == "csv":
            return Response(
                _as_csv(windows),
                media_type="text/csv",
                headers={"Content-Disposition": f'attachment; filename="{name}.csv"'},
            )
        return {"status": "ok" if windows else _NO_DATA, "window_type": name, "windows": windows}

    @app.get("/metrics/plan", tags=["metrics"])
    def plan_ahead() -> dict[str, Any]:
        """The rate plan: its text, its rate from five minutes ago to ten minutes ahead, and the rate delivered."""
        found = store.plan(clock.now_ms())
        return {name: found[name] for name in ("plan", "planned", "delivered")}

    @app.get("/metrics/stream", tags=["metrics"], response_class=StreamingResponse)
    async def stream(request: Request) -> StreamingResponse:
        """Server-sent events: event ``summary`` with the JSON of ``/metrics/summary``, when it changed, at most once a second.

        In silence every five seconds. ``health`` is in it too: ``status``, ``reasons``, ``stale_since``.
        """
        return StreamingResponse(
            _events(store, clock, request, ending),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    @app.get("/metrics", tags=["metrics"], response_class=PlainTextResponse)
    def prometheus() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/ratings/tail", tags=["ratings"])
    def tail(limit: Annotated[int, Query(ge=1, le=100)] = 10) -> dict[str, Any]:
        """The newest records of topic ``ratings``, newest first, each value as it is; of its first 16 partitions, where it has more."""
        records = feed.tail(limit)
        rows = [
            {
                "partition": r.partition,
                "offset": r.offset,
                "key": r.key,
                "value": None if r.value is None else r.value.decode(errors="replace"),
            }
            for r in records
        ]
        return {"status": "ok" if rows else _NO_DATA, "ratings": rows}

    def explained(ask: Callable[[int, int], dict[str, Any]], partition: int, place: int) -> dict[str, Any]:
        try:
            return ask(partition, place)
        except UncheckedError:
            if store.run():
                raise
            return {"status": _NO_DATA, "partition": partition}

    @app.get("/events/{partition}/{index}", tags=["ratings"])
    def event(partition: _Place, index: _Place) -> dict[str, Any]:
        """Where rating ``index`` of a partition comes from, and what is in Kafka at its place."""
        return explained(explanations.by_index, partition, index)

    @app.get("/records/{partition}/{offset}", tags=["ratings"])
    def record(partition: _Place, offset: _Place) -> dict[str, Any]:
        """Where the record at an offset of topic ``ratings`` comes from; ``foreign`` when it is no rating of the run."""
        return explained(explanations.by_offset, partition, offset)

    @app.get("/ratings/rejected", tags=["ratings"])
    def rejects() -> dict[str, Any]:
        """The last records that were no valid rating, newest first."""
        rows = store.rejects()
        return {"status": "ok" if rows else _NO_DATA, "rejected": rows}

    def admit(request: Request) -> None:
        try:
            gate.admit(request.client.host if request.client else None, request.headers)
        except Refused as error:
            raise HTTPException(error.status, error.reason) from None

    app.include_router(scoreboard_routes(store, predictions, admit))
    app.include_router(outside_routes(store, outside, catalogue, clock, admit))

    async def obey(
        request: Request,
        command: str,
        rate: float | None = None,
        actors: int | None = None,
        plan: str | None = None,
    ) -> dict[str, Any]:
        admit(request)
        identity, applied = await run_in_threadpool(control.send, command, rate, actors, plan)
        return {"id": identity, "command": command, "applied": applied}

    @app.post("/control/rate", tags=["control"])
    async def rate(request: Request, change: RateChange) -> dict[str, Any]:
        """Change the target rate; ``applied`` tells whether the generator has said so within two seconds."""
        return {**await obey(request, "rate", change.rate), "rate": change.rate}

    @app.post("/control/plan", tags=["control"])
    async def plan(request: Request, change: PlanChange) -> dict[str, Any]:
        """Change the rate plan; ``applied`` tells whether the generator has said so within two seconds."""
        admit(request)
        try:
            parse_plan(change.plan)
        except PlanError as error:
            raise HTTPException(422, str(error)) from None
        return {**await obey(request, "plan", plan=change.plan), "plan": tidy(change.plan)}

    @app.post("/control/pause", tags=["control"])
    async def pause(request: Request) -> dict[str, Any]:
        """Send nothing until resumed."""
        return await obey(request, "pause")

    @app.post("/control/resume", tags=["control"])
    async def resume(request: Request) -> dict[str, Any]:
        """Go on at the target rate."""
        return await obey(request, "resume")

    @app.post("/control/scale", tags=["control"])
    async def scale(request: Request, change: ScaleChange) -> dict[str, Any]:
        """Change the number of generator actors; new ones take some seconds to start, ``applied`` is false until then."""
        return {**await obey(request, "scale", actors=change.actors), "actors": change.actors}

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("path", "query", "body")) or "body"
        return JSONResponse({"error": f"{where}: {first['msg']}"}, 422)

    @app.exception_handler(RayPipelineError)
    async def not_to_be_had(_: Request, error: RayPipelineError) -> JSONResponse:
        status = next((status for kind, status in _STATUS_OF.items() if isinstance(error, kind)), 503)
        return JSONResponse({"error": str(error)}, status)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"internal error ({type(error).__name__}); the log has more"}, 500)

    return app


def _head(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: record[name] for name in ("window_start", "window_end", "window_type", "count", "avg_rating", "final")
    }


def _parse_time(name: str, text: str | None) -> int | None:
    """ISO-8601 (UTC where no zone is given) → epoch milliseconds."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text.replace(" ", "+"))  # a plus sign in a query means a space
    except ValueError:
        raise HTTPException(422, f"{name}: {text!r} is no ISO-8601 time, such as 2026-01-31T12:00:00Z") from None
    return math.floor((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)


def _as_csv(windows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(windows)
    return text.getvalue()


async def _events(
    store: MetricsStore, clock: Clock, request: Request, ending: threading.Event | None
) -> AsyncIterator[str]:
    sent, sent_ms = -1, 0
    while not (ending and ending.is_set()) and not await request.is_disconnected():
        now_ms = clock.now_ms()
        # rates and health change by silence, too
        if store.version != sent or now_ms - sent_ms >= _STREAM_QUIET_MS:
            sent, sent_ms = store.version, now_ms
            data = json.dumps(store.summary_with_health(now_ms), separators=(",", ":"))
            yield f"event: summary\nid: {sent}\ndata: {data}\n\n"
        else:
            yield ": nothing new\n\n"
        await asyncio.sleep(_STREAM_S)
