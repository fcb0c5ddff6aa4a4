"""Small files at any Hadoop URI, through the session's own file system classes."""

from __future__ import annotations

from typing import Any

from py4j.protocol import Py4JJavaError

__all__ = ["exists", "list_files", "list_names", "move_new", "read_text", "remove", "replace"]


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


def list_files(spark: Any, uri: str) -> list[str]:
    """Paths of all files below a folder, relative to it, in order; none when it is not there."""
    system, path = _file_system(spark, uri)
    if not system.exists(path):
        return []
    root = system.makeQualified(path).toUri()
    found, files = [], system.listFiles(path, True)
    while files.hasNext():
        found.append(str(root.relativize(files.next().getPath().toUri()).getPath()))
    return sorted(found)


def move_new(spark: Any, source: str, target: str) -> bool:
    """Give a file another name, unless there is one of that name; whether it was given.

    Raises:
        OSError: it could not be.
    """
    system, path = _file_system(spark, source)
    to = spark._jvm.org.apache.hadoop.fs.Path(target)
    try:
        if system.exists(to):
            return False
        system.mkdirs(to.getParent())
        if not system.rename(path, to):
            raise OSError(f"{source} could not be renamed to {target}")
    except Py4JJavaError as error:
        raise OSError(error.java_exception.toString()) from error
    return True


def replace(spark: Any, target: str, content: bytes) -> None:
    """Write a small file whole, in place of what was there: a reader sees the former content or the new one.

    Raises:
        OSError: it could not be.
    """
    hadoop = spark._jvm.org.apache.hadoop.fs
    fresh = f"{target.rpartition('/')[0]}/.{target.rpartition('/')[2]}.fresh"
    try:
        system, path = _file_system(spark, fresh)
        stream = system.create(path, True)
        try:
            stream.write(bytearray(content))
        finally:
            stream.close()
        options = spark._sc._gateway.new_array(hadoop.Options.Rename, 1)
        options[0] = hadoop.Options.Rename.OVERWRITE
        context = hadoop.FileContext.getFileContext(path.toUri(), spark._jsc.hadoopConfiguration())
        context.rename(path, hadoop.Path(target), options)
    except Py4JJavaError as error:
        raise OSError(error.java_exception.toString()) from error


def remove(spark: Any, uri: str) -> None:
    """Remove a file or folder with all that is in it; nothing when it is not there.

    Raises:
        OSError: it could not be.
    """
    system, path = _file_system(spark, uri)
    try:
        system.delete(path, True)
    except Py4JJavaError as error:
        raise OSError(error.java_exception.toString()) from error
