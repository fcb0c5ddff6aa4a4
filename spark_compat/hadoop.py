"""Small files at any Hadoop URI, through the session's own file system classes."""

from __future__ import annotations

from typing import Any

from py4j.protocol import Py4JJavaError

__all__ = ["exists", "list_names", "read_text", "write_text"]


def _file_system(spark: Any, uri: str) -> tuple[Any, Any]:
    path = spark._jvm.org.apache.hadoop.fs.Path(uri)
    return path.getFileSystem(spark._jsc.hadoopConfiguration()), path


def exists(spark: Any, uri: str) -> bool:
    """Whether there is something at ``uri``."""
    system, path = _file_system(spark, uri)
    return bool(system.exists(path))


def list_names(spark: Any, uri: str) -> list[str]:
    """Names of what is in a folder; none when it is not there."""
    system, path = _file_system(spark, uri)
    return [str(status.getPath().getName()) for status in system.listStatus(path)] if system.exists(path) else []


def read_text(spark: Any, uri: str) -> str | None:
    """The file's text; None when there is none.

    Raises:
        OSError: it cannot be read, such as when its checksum does not fit.
        ValueError: it is no text.
    """
    system, path = _file_system(spark, uri)
    if not system.exists(path):
        return None
    try:
        stream = system.open(path)
        try:
            return bytes(stream.readAllBytes()).decode()
        finally:
            stream.close()
    except Py4JJavaError as error:
        raise OSError(f"it cannot be read ({error.java_exception.toString()})") from error


def write_text(spark: Any, uri: str, text: str) -> None:
    """Write a file, replacing what was there; folders are made."""
    system, path = _file_system(spark, uri)
    stream = system.create(path, True)
    try:
        stream.write(bytearray(text.encode()))
    finally:
        stream.close()
