"""Files that a command writes its result to: looked at before the work, written after the result has been shown."""

from __future__ import annotations

import os
from pathlib import Path

from ray_pipeline.errors import ConfigurationError, EnvironmentProblem

__all__ = ["require_file", "write_file"]


def require_file(file: Path, flag: str) -> None:
    """Refuse a file that could not be written, before there is anything to write.

    Args:
        file: the file; it need not be there.
        flag: the option that names it.

    Raises:
        ConfigurationError: its folder does not exist, or it is a folder itself.
        EnvironmentProblem: this user may not write it.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ConfigurationError(problem=f"{flag}: there is no folder {folder}", fix="Make it, or name another file")
    if file.is_dir():
        raise ConfigurationError(problem=f"{flag}: {file} is a folder", fix="Name a file")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise EnvironmentProblem(problem=f"{flag}: {file} may not be written by this user", fix="Name another file")


def write_file(file: Path, text: str, what: str, flag: str) -> None:
    """Write a result that has been shown.

    Args:
        file: the file.
        text: what to write.
        what: what it is, such as ``summary``.
        flag: the option that names the file.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(
            problem=f"the {what} cannot be written to {file} ({error.strerror})",
            fix=f"It stands above; name another file with {flag}",
        ) from None
