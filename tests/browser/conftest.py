"""Debian's Chromium for the browser tests."""

from __future__ import annotations

import shutil
from typing import Any

import pytest


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args: dict[str, Any]) -> dict[str, Any]:
    executable = shutil.which("chromium")
    if executable is None:
        pytest.fail("chromium is missing: run 'make browser', or install it: sudo apt-get install chromium")
    return {**browser_type_launch_args, "executable_path": executable, "args": ["--no-sandbox"]}
