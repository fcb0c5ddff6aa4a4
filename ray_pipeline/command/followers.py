"""Stages that run alone and only follow a stream: ``reset`` must know of them, and no other command takes them for a pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ray_pipeline.state import RunInfo, active_runs, forget_run, remember_run

__all__ = ["FOLLOWERS", "followers", "known_as_follower"]

FOLLOWERS = "followers"
"""The folder of the state directory that they are written down in, apart from those who send, count or have the broker."""


@contextlib.contextmanager
def known_as_follower(state_dir: Path, stage: str, bootstrap: str) -> Iterator[None]:
    """Have this process written down meanwhile, unless the state directory cannot be written: nothing could be cleared there either.

    Args:
        state_dir: the state directory.
        stage: ``serve`` or ``verify``.
        bootstrap: brokers, HOST:PORT[,…].
    """
    folder = state_dir / FOLLOWERS
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        remember_run(folder, RunInfo.of_this_process(bootstrap, stages=(stage,)))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            forget_run(folder)


def followers(state_dir: Path) -> list[RunInfo]:
    """Those that run with this state directory."""
    return active_runs(state_dir / FOLLOWERS)
