"""Broken files of a checkpoint are named, and only those that Spark would read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.config import load_settings
from ray_pipeline.windows.checkpoint import BrokenFile, find_broken, state_problem
from ray_pipeline.windows.marker import marker_for, mismatch

OFFSETS = 'v1\n{"batchWatermarkMs":0}\n{"ratings":{"0":7,"1":12}}'
COMMITS = 'v1\n{"nextBatchWatermarkMs":0}'


def look(offsets: dict[int, str], commits: dict[int, str]) -> BrokenFile | None:
    files = {f"offsets/{n}": text for n, text in offsets.items()} | {
        f"commits/{n}": text for n, text in commits.items()
    }

    def names(folder: str) -> list[str]:
        return [".12.crc", *(name.split("/")[1] for name in files if name.startswith(folder))]

    return find_broken(names, files.__getitem__)


def test_a_whole_checkpoint_and_a_new_one_are_fine() -> None:
    assert look({}, {}) is None
    assert look({0: OFFSETS}, {}) is None
    assert look({8: OFFSETS, 9: OFFSETS, 10: OFFSETS}, {8: COMMITS, 9: COMMITS}) is None


@settings(deadline=None)
@given(st.integers(0, len(OFFSETS) - 1))
def test_an_offsets_file_cut_anywhere_is_found(length: int) -> None:
    found = look({9: OFFSETS, 10: OFFSETS[:length]}, {9: COMMITS})
    assert found is not None and (found.name, found.newest) == ("offsets/10", True)
    assert "commits/10" in found.way_out and "again" in found.way_out


@settings(deadline=None)
@given(st.integers(0, len(COMMITS) - 1))
def test_a_commits_file_cut_anywhere_is_found(length: int) -> None:
    found = look({9: OFFSETS, 10: OFFSETS}, {9: COMMITS, 10: COMMITS[:length]})
    assert found is not None and (found.name, found.newest) == ("commits/10", True)


def test_what_is_older_than_the_newest_batch_cannot_be_worked_out_again() -> None:
    found = look({9: "", 10: OFFSETS}, {9: COMMITS, 10: COMMITS})
    assert found == BrokenFile("offsets/9", "it is empty", False) and "reset" in found.way_out
    assert "Remove" not in found.way_out


def test_files_that_spark_does_not_read_do_not_matter() -> None:
    assert look({7: "", 9: OFFSETS, 10: OFFSETS}, {7: "", 9: COMMITS, 10: COMMITS}) is None


def test_a_broken_state_file_is_told_from_other_errors() -> None:
    text = "Job aborted\n\tat x.y(Z.scala:1)\nCaused by: java.io.EOFException: Stream ended prematurely\n\tat a.b"
    assert state_problem(text) == "java.io.EOFException: Stream ended prematurely"
    assert state_problem("Job aborted: executor 1 lost") is None
    assert "commits/17" in BrokenFile("state/17", "x", True).way_out


@pytest.mark.parametrize(
    "cause",
    [
        "java.io.IOException: No space left on device",
        "java.lang.OutOfMemoryError: Java heap space",
        "[…UNRELEASED_THREAD…]",
    ],
)
def test_a_state_that_cannot_be_loaded_now_is_not_broken(cause: str) -> None:
    text = f"SparkException: [CANNOT_LOAD_STATE_STORE.UNCATEGORIZED] An error occurred during loading state.\nCaused by: {cause}"
    assert state_problem(text) is None


def test_a_marker_that_is_cut_off_is_of_no_settings() -> None:
    for text in ("", json.dumps(marker_for(load_settings()))[:20]):
        assert mismatch(load_settings(), text) == "its file ray-pipeline.json is cut off"


def test_a_checkpoint_of_another_guard_goes_on_unless_records_are_ahead_on_purpose() -> None:
    first, later = load_settings(start_time_ms=1_700_000_000_000), load_settings()
    assert mismatch(later, json.dumps(marker_for(first))) is None
    ahead = {"future_share": 0.1, "future_s": 86_400.0}
    found = mismatch(load_settings(**ahead), json.dumps(marker_for(load_settings(**ahead, max_ahead_s=0))))
    assert found == "max_ahead_s was 0.0, is 600.0"
