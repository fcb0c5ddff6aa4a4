"""Unit tests start nothing: no process and no connection, so no Ray, Kafka or JVM."""

from __future__ import annotations

import socket
import subprocess

import pytest
from hypothesis import settings

# a busy machine is no failure: the timeout of each test bounds it
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a unit test must not start a process or open a connection")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in [name for name in __import__("os").environ if name.startswith("RAY_PIPELINE_")]:
        monkeypatch.delenv(name)
