"""Small files at any Hadoop URI, through the session's own file system classes."""

from __future__ import annotations

from typing import Any

__all__ = ["exists", "read_text", "write_text"]


def _file_system(spark: Any, uri: str) -> tuple[Any, Any]:
    path = spark._jvm.org.apache.hadoop.fs.Path(uri)
    return path.getFileSystem(spark._jsc.hadoopConfiguration()), path


def exists(spark: Any, uri: str) -> bool:
    """Whether there is something at ``uri``."""
    system, path = _file_system(spark, uri)
    return bool(system.exists(path))


def read_text(spark: Any, uri: str) -> str | None:
    """The file's text; None when there is none."""
    system, path = _file_system(spark, uri)
    if not system.exists(path):
        return None
    stream = system.open(path)
    try:
        return bytes(stream.readAllBytes()).decode()
    finally:
        stream.close()


def write_text(spark: Any, uri: str, text: str) -> None:
    """Write a file, replacing what was there; folders are made."""
    system, path = _file_system(spark, uri)
    stream = system.create(path, True)
    try:
        stream.write(bytearray(text.encode()))
    finally:
        stream.close()
