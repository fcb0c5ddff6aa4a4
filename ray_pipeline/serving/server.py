"""The serving stage: feed, API and dashboard in one process. Plain class; an actor where it is started."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from dataclasses import asdict
from typing import Any

import uvicorn
from fastapi import FastAPI

from ray_pipeline.clock import Clock, SystemClock
from ray_pipeline.config import Settings
from ray_pipeline.delivery.outside import OutsideDelivery
from ray_pipeline.errors import EnvironmentProblem
from ray_pipeline.formats.factory import open_format
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.serving.api import make_api
from ray_pipeline.serving.control import Control
from ray_pipeline.serving.explanations import Explanations
from ray_pipeline.serving.feed import Feed
from ray_pipeline.serving.gate import ControlGate
from ray_pipeline.serving.outside import OutsideQueue
from ray_pipeline.serving.predictions import PredictionQueue
from ray_pipeline.serving.reach import url_of
from ray_pipeline.windows.spec import window_specs

__all__ = ["ServingStage"]

_log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Uvicorn on a thread and a socket that is bound already."""

    def __init__(self, app: FastAPI, bound: socket.socket, name: str) -> None:
        super().__init__(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="on", access_log=False)
        )
        self._bound = bound
        self.thread = threading.Thread(target=self.run, args=([bound],), name=name, daemon=True)

    def stop(self, deadline_s: float) -> None:
        self.should_exit = True
        if self.thread.is_alive():
            self.thread.join(deadline_s)
        self._bound.close()


class ServingStage:
    """Serves the API, and the dashboard when the settings ask for it.

    Args:
        settings: all settings; ``control_token`` should be set, else one is made up that nobody knows.
        bootstrap: brokers, HOST:PORT[,…].
        clock: tells the time.
    """

    def __init__(self, settings: Settings, bootstrap: str, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self._store = MetricsStore(tuple(spec.name for spec in window_specs(settings)))
        self._feed = Feed(settings, bootstrap, self._store, self._clock)
        self._control = Control(settings, bootstrap, self._store, self._clock)
        self._explanations = Explanations(settings, bootstrap, self._clock)
        self._predictions = PredictionQueue(settings, bootstrap)
        self._outside = OutsideQueue(
            lambda: OutsideDelivery(bootstrap, settings.ratings_topic, settings.outside_topic, open_format(settings))
        )
        self._servers: list[_Server] = []
        self._urls: dict[str, str] = {}
        self._ending = threading.Event()
        self._state = "starting"

    def start(self) -> None:
        """Bind the ports and begin to serve; returns when both answer.

        Raises:
            EnvironmentProblem: a port is in use.
        """
        settings = self._settings
        catalogue = load_catalogue(settings)
        api_socket = _bind(settings.api_host, settings.api_port, "--api-port")
        ui_socket = _bind(settings.ui_host, settings.ui_port, "--ui-port") if settings.ui else None
        sockets = [s for s in (api_socket, ui_socket) if s is not None]
        gate = ControlGate(
            settings.control_token or secrets.token_urlsafe(24), tuple(s.getsockname()[1] for s in sockets)
        )
        self._feed.start()
        api = make_api(
            self._store,
            catalogue,
            self._feed,
            self._control,
            gate,
            self._explanations,
            settings.top_n,
            self._clock,
            self._predictions,
            self._ending,
            outside=self._outside,
        )
        self._serve(api, api_socket, "api", settings.api_host)
        if ui_socket is not None:
            from ray_pipeline.serving.dashboard import make_dashboard

            page = make_dashboard(
                self._store,
                catalogue,
                self._feed,
                self._control,
                gate,
                self._explanations,
                settings,
                self._urls["api"],
                self._clock,
            )
            self._serve(page, ui_socket, "ui", settings.ui_host)
        self._state = "running"

    def urls(self) -> dict[str, str]:
        """Where ``api`` and ``ui`` are, on this machine."""
        return dict(self._urls)

    def status(self) -> dict[str, Any]:
        """State of the stage."""
        dead = [server.thread.name for server in self._servers if not server.thread.is_alive()]
        if self._state == "running" and dead:
            return {"state": "failed", "reason": f"{', '.join(dead)} ended by itself"}
        return {"state": self._state, "windows": asdict(self._store.tally(self._clock.now_ms()))}

    def summary(self) -> dict[str, Any]:
        """What ``GET /metrics/summary`` says, with health."""
        return self._store.summary_with_health(self._clock.now_ms())

    def stop(self, deadline_s: float = 10.0) -> None:
        """End servers and feed."""
        self._state = "stopping"
        self._ending.set()
        for server in self._servers:
            server.stop(deadline_s)
        self._feed.stop()
        self._predictions.close(deadline_s)
        self._outside.close(deadline_s)
        self._state = "stopped"

    def _serve(self, app: FastAPI, bound: socket.socket, name: str, host: str) -> None:
        server = _Server(app, bound, name)
        self._servers.append(server)
        server.thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            if not server.thread.is_alive() or time.monotonic() > deadline:
                raise EnvironmentProblem(problem=f"the server of the {name} did not start", fix="See its log")
            time.sleep(0.02)
        self._urls[name] = url_of(host, bound.getsockname()[1])


def _bind(host: str, port: int, flag: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise EnvironmentProblem(
            problem=f"port {port} on {host} cannot be used ({error.strerror})", fix=f"Choose another with {flag}, or 0"
        ) from None
    return bound
