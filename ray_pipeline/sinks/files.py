"""A file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ray_pipeline.errors import ConfigurationError

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which gets its name when the block has ended well; else nothing is left of it.

    Args:
        path: the name; must not exist.

    Raises:
        ConfigurationError: it exists, or its folder cannot be written to.
        OSError: writing failed.
    """
    _refuse_existing(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        stream = beside.open("wb")
    except OSError as error:
        raise ConfigurationError(
            problem=f"output {path} cannot be written: {error.strerror}",
            fix="Name a file in a folder that is there and yours",
        ) from None
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _refuse_existing(path)
        beside.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise ConfigurationError(problem=f"output {path} exists already", fix="Name another --output, or remove it")
