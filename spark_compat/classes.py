"""Archives of loaded classes (class data sharing): a JVM that is given one maps its classes instead of reading and checking each.

A start of the pipeline is mostly JVMs that load the same classes again. What they load is known: ``class_lists/`` has the names, from a
run with these versions (``python -m spark_compat --help`` says how to renew them). An archive belongs to one Java and one classpath,
file by file; for any other there is none, and the JVM starts as it would without. ``python -m spark_compat`` makes them.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import platformdirs

from spark_compat.errors import SparkCompatError
from spark_compat.jars import kafka_broker_jars
from spark_compat.jvm import Java, path_option

__all__ = ["ClassArchive", "broker_classes", "class_list", "names_of", "remove_orphans", "spark_classes"]

_DEADLINE_S = 600.0


class ClassArchive:
    """The archive of one kind of JVM.

    Args:
        name: which list of classes: ``kafka`` or ``spark``.
        java: the Java that makes and uses it.
        classpath: as the JVM is given it, or as much of it as all of a kind have in common at its begin; ``*`` as Java takes it.
    """

    def __init__(self, name: str, java: Java, classpath: Sequence[str]) -> None:
        self._name = name
        self._java = java
        self._classpath = tuple(classpath)
        place = hashlib.sha256("\n".join((str(java.home), *classpath)).encode()).hexdigest()[:16]
        self._file = _folder() / f"classes-{name}-{place}.jsa"
        self._made_of = self._file.with_suffix(".json")

    @property
    def name(self) -> str:
        """Whose classes."""
        return f"classes of {self._name}"

    @property
    def file(self) -> Path:
        """Where it is, or would be."""
        return self._file

    def options(self) -> list[str]:
        """What a JVM is to be started with; nothing when there is no archive of just this Java and these files."""
        return path_option("-XX:SharedArchiveFile", self._file) if self.is_made() else []

    def is_made(self) -> bool:
        """Whether it is there, and of the files that are there now."""
        try:
            return self._file.is_file() and json.loads(self._made_of.read_text()) == self._parts()
        except (OSError, ValueError):
            return False

    def make(self) -> None:
        """Make it; takes half a minute of one core for Spark.

        Raises:
            SparkCompatError: it cannot be made, such as by a Java without class data sharing; starts work as before, but slower.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        parts = self._parts()
        with tempfile.TemporaryDirectory(dir=self._file.parent) as folder:
            names, fresh = Path(folder) / "classes.txt", Path(folder) / "classes.jsa"
            names.write_bytes(gzip.decompress(class_list(self._name).read_bytes()))
            command = [str(self._java.executable), "-Xshare:dump", f"-XX:SharedClassListFile={names}"]
            command += [f"-XX:SharedArchiveFile={fresh}", "-Xlog:disable", "-cp", os.pathsep.join(self._classpath)]
            try:
                subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=True)
                fresh.replace(self._file)
            except (OSError, subprocess.SubprocessError) as error:
                said = (getattr(error, "stderr", None) or getattr(error, "stdout", None) or "").strip()[-300:]
                raise SparkCompatError(
                    f"the archive of the classes of {self._name} could not be made ({error}){': ' if said else ''}{said}",
                    "Nothing needs it; starts take some seconds more without",
                ) from error
        self._made_of.write_text(json.dumps(parts))

    def _parts(self) -> list[list[str | int]]:
        """What it is made of: path, bytes and time (s) of each file."""
        found = [self._java.home / "lib" / "server" / "libjvm.so", *_expanded(self._classpath)]
        rows: list[list[str | int]] = []
        for path in found:
            stat = path.stat()
            rows.append([str(path), stat.st_size, int(stat.st_mtime)])  # as Java takes it; images keep no more
        digest = hashlib.sha256(class_list(self._name).read_bytes()).hexdigest()
        return [*rows, [digest, 0, 0]]


def broker_classes(java: Java) -> ClassArchive:
    """Of the embedded broker."""
    return ClassArchive("kafka", java, [str(jar) for jar in kafka_broker_jars()])


def spark_classes(java: Java) -> ClassArchive:
    """Of Spark on Ray: driver, executor and RayDP's two masters begin with the same classpath, that which RayDP puts together."""
    spark_home = os.environ.get("SPARK_HOME") or _package("pyspark")
    raydp, ray = (map(str, (_package(name) / "jars").glob("*")) for name in ("raydp", "ray"))
    return ClassArchive("spark", java, [*raydp, str(Path(spark_home).absolute() / "jars" / "*"), *ray])


def remove_orphans() -> None:
    """Remove archives of installations that are gone."""
    for made_of in _folder().glob("classes-*.json"):
        try:
            gone = not all(Path(path).exists() for path, *_ in json.loads(made_of.read_text())[:-1])
        except (OSError, ValueError):
            gone = True
        if gone:
            made_of.with_suffix(".jsa").unlink(missing_ok=True)
            made_of.unlink(missing_ok=True)


def class_list(name: str) -> Path:
    """The file with the names of the classes of one kind of JVM, compressed."""
    return Path(__file__).parent / "class_lists" / f"{name}.txt.gz"


def names_of(dumped: Iterable[str]) -> list[str]:
    """Lines of ``-XX:DumpLoadedClassList`` of several JVMs as one list, without what is made anew in each JVM."""
    lines = (line.strip() for line in dumped)
    kept = (line if line.startswith("@") else line.split(" ")[0] for line in lines if line and "source:" not in line)
    return list(dict.fromkeys(line for line in kept if not line.startswith("#") and "$Proxy" not in line))


def _folder() -> Path:
    return Path(platformdirs.user_cache_dir("ray-pipeline"))


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SparkCompatError(f"the Python package {name} is missing", "Install it: make install")
    return Path(found.origin).absolute().parent


def _expanded(classpath: Iterable[str]) -> list[Path]:
    """Files of a classpath, with those of ``*``."""
    paths = map(Path, classpath)
    return [file for path in paths for file in (sorted(path.parent.glob("*")) if path.name == "*" else [path])]
