"""Local paths as Spark and Hadoop name them. What looks like a URI is read as it stands: ``%20`` is three characters."""

from __future__ import annotations

from pathlib import Path

__all__ = ["hadoop_uri", "local_path"]

_SCHEME = "file:"


def hadoop_uri(path: Path) -> str:
    """A local path as Hadoop's ``Path(String)`` takes it; :meth:`pathlib.Path.as_uri` would have it make ``my%20folder``."""
    return f"{_SCHEME}//{path.absolute()}"


def local_path(uri: str) -> Path | None:
    """The local path that Hadoop makes of an address; None where it is of another file system, or says none."""
    return Path(uri.removeprefix(_SCHEME).removeprefix("//")) if uri.startswith(_SCHEME) else None
