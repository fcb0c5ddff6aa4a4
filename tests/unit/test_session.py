"""What a local Ray leaves on disk."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil

from ray_pipeline.cluster.session import clear_copies, clear_former, clear_session, java_folder, mark_session

NOBODY = 2**22 + 1  # above what Linux gives a process


def session(root: Path, number: int, **mark: Any) -> Path:
    """As a run leaves it, marked by one that has ended unless told otherwise."""
    folder = root / f"session_2026-01-0{number}_00-00-00_000000_1"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "raylet.out").write_text("what happened")
    mark_session(folder)
    (java_folder(folder) / "librocksdbjni.so").write_text("large")
    (folder / "libcore_worker_library_java.so").write_text("large")
    (folder / "sockets").symlink_to(root)  # a link is removed, not what it leads to
    file = folder / "ray-pipeline.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pid": NOBODY, **mark}))
    return folder


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


ALL = {"logs", "ray-pipeline.json", "java", "libcore_worker_library_java.so", "sockets"}
KEPT = {"logs", "ray-pipeline.json"}


def test_a_run_takes_all_of_its_session_with_it_but_the_logs(tmp_path: Path) -> None:
    mine = session(tmp_path, 1)
    clear_session(mine)
    assert names(mine) == KEPT and (mine / "logs" / "raylet.out").read_text() == "what happened"
    assert names(tmp_path) == {mine.name}
    clear_session(tmp_path / "gone")


def test_what_was_left_is_cleared_and_the_logs_of_the_last_five_are_kept(tmp_path: Path) -> None:
    left = [session(tmp_path, number) for number in range(1, 9)]
    clear_former(tmp_path)
    assert names(tmp_path) == {folder.name for folder in left[3:]}
    assert all(names(folder) == KEPT for folder in left[3:])


def test_whoever_runs_or_is_somebody_else_keeps_everything(tmp_path: Path) -> None:
    me = {"pid": psutil.Process().pid}
    kept = [session(tmp_path, 1, **me), session(tmp_path, 2, host="elsewhere"), session(tmp_path, 3)]
    (kept[2] / "ray-pipeline.json").write_text("[]")
    unmarked = tmp_path / "session_of_ray"
    unmarked.mkdir()
    (tmp_path / "session_latest").symlink_to(kept[0])
    clear_former(tmp_path)
    assert all(names(folder) == ALL for folder in kept)
    assert unmarked.is_dir()
    clear_former(tmp_path / "nothing")


def test_copies_of_a_library_that_are_loaded_are_removed_and_nothing_that_looks_alike(tmp_path: Path) -> None:
    now_ms = time.time_ns() // 1_000_000

    def copy(made_ms: int, *more: str) -> Path:
        folder = tmp_path / str(made_ms)
        folder.mkdir()
        for name in ("file_lock", "libcore_worker_library_java.so", *more):
            (folder / name).write_text("")
        return folder

    loaded = copy(now_ms - 60_000)
    kept = [copy(now_ms), copy(now_ms - 70_000, "something else"), tmp_path / "session_1"]
    kept[2].mkdir()
    clear_copies(tmp_path)
    assert not loaded.exists() and all(folder.exists() for folder in kept)
