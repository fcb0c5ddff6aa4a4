"""Local paths as Spark and Hadoop name them. What looks like a URI is read as it stands: ``%20`` is three characters."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

__all__ = ["hadoop_uri", "local_path", "plain_uri"]

_SCHEME = "file:"


def hadoop_uri(path: Path) -> str:
    """A local path as Hadoop's ``Path(String)`` takes it; :meth:`pathlib.Path.as_uri` would have it make ``my%20folder``."""
    return f"{_SCHEME}//{path.absolute()}"


def local_path(uri: str) -> Path | None:
    """The local path that Hadoop makes of an address; None where it is of another file system, or says none."""
    return Path(uri.removeprefix(_SCHEME).removeprefix("//")) if uri.startswith(_SCHEME) else None


@contextlib.contextmanager
def plain_uri(uri: str) -> Iterator[str]:
    """Another address of a local folder for so long, for a reader that quotes what it is given, as that of Spark's state does.

    It is that of a link among the temporary files; where nothing would be quoted, and on other file systems, it is ``uri`` itself.
    """
    path = local_path(uri)
    if path is None or quote(str(path)) == str(path):
        yield uri
        return
    with tempfile.TemporaryDirectory(prefix="ray-pipeline-") as folder:
        link = Path(folder) / "link"
        link.symlink_to(path, target_is_directory=True)
        yield hadoop_uri(link)
