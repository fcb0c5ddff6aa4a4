"""The folder of a local Ray's session. Ray removes none, ever; here a run takes most of its own with it, and leaves the logs."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import ray as _untyped_ray

from ray_pipeline.state import still_runs

ray: Any = _untyped_ray  # where its session is, it tells nobody

__all__ = [
    "clear_copies",
    "clear_former",
    "clear_session",
    "java_folder",
    "leave_session",
    "mark_session",
    "session_folder",
    "take_session",
]

_log = logging.getLogger(__name__)

_MARK = "ray-pipeline.json"
_LOGS = "logs"
_KEPT = 5
_OF_JAVA_DRIVERS = Path("/tmp/ray")
_COPY = {"file_lock", "libcore_worker_library_java.so"}
_LOADED_MS = 30_000


def session_folder() -> Path:
    """Of the Ray that this process has joined, on this node."""
    return Path(ray._private.worker._global_node.get_session_dir_path())


def java_folder(session: Path) -> Path:
    """Where the JVMs on a local Ray put what they need for as long as they run: killed, they remove nothing."""
    return session / "java"


def take_session() -> Path:
    """Make the session of the Ray that this process has started its own, and clear what was left before; returns its folder."""
    session = session_folder()
    mark_session(session)
    clear_former(session.parent)
    clear_copies()
    return session


def leave_session(session: Path) -> None:
    """Clear it: its Ray has ended."""
    clear_session(session)
    clear_copies()


def mark_session(session: Path) -> None:
    """Say whose it is: a run's own, which nobody needs any more when this process has ended."""
    me = psutil.Process()
    mark = {"host": socket.gethostname(), "pid": me.pid, "process_started": me.create_time()}
    (session / _MARK).write_text(json.dumps(mark))
    java_folder(session).mkdir(exist_ok=True)


def clear_session(session: Path) -> None:
    """Remove all but the logs, and the mark. What another process still holds is left for :func:`clear_former`."""
    for entry in _entries(session):
        if entry.name in (_MARK, _LOGS):
            continue
        if entry.is_dir(follow_symlinks=False):
            _remove(Path(entry.path))
            continue
        try:
            os.unlink(entry.path)
        except OSError as error:
            _log.info("%s stays: %s", entry.path, error)


def clear_former(root: Path) -> None:
    """Clear what runs have left that were killed, and remove the logs of all but the last few.

    Args:
        root: where the sessions are; those that no run of this package has marked stay as they are.
    """
    ended = [Path(entry.path) for entry in _entries(root) if entry.is_dir(follow_symlinks=False) and _has_ended(entry)]
    newest_first = sorted(ended, key=lambda session: session.name, reverse=True)  # a name begins with the time
    for session in newest_first[:_KEPT]:
        clear_session(session)
    for session in newest_first[_KEPT:]:
        _remove(session)


def clear_copies(root: Path = _OF_JAVA_DRIVERS) -> None:
    """Remove the copies of Ray's library that its Java drivers, of which RayDP's master is one, have loaded and need no more.

    Each makes one of 40 MB, in a folder that no setting moves, and leaves it there.

    Args:
        root: where they are, each in a folder that is named by the time it was made, epoch milliseconds.
    """
    for entry in _entries(root):
        if not re.fullmatch(r"[0-9]{13}", entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        loaded = time.time() * 1000 - int(entry.name) > _LOADED_MS
        if loaded and _is_mine(entry) and {file.name for file in _entries(Path(entry.path))} == _COPY:
            _remove(Path(entry.path))


def _remove(folder: Path) -> None:
    """With all that can be removed: whatever still has files open there ends soon, and the next start looks again."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        _log.info("%s stays, or a part of it", folder)


def _is_mine(entry: os.DirEntry[str]) -> bool:
    return entry.stat(follow_symlinks=False).st_uid == os.getuid()


def _has_ended(session: os.DirEntry[str]) -> bool:
    """Whether it was this user's, and its process, on this machine or in this container, has ended."""
    try:
        mark = json.loads((Path(session.path) / _MARK).read_text())
        mine = _is_mine(session) and mark["host"] == socket.gethostname()
        return mine and not still_runs(int(mark["pid"]), float(mark["process_started"]))
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
