"""Java: found, checked, and put where Ray's and Spark's processes look for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from spark_compat.errors import SparkCompatError
from spark_compat.versions import JAVA_MIN

__all__ = ["Java", "export_java", "find_java", "path_option"]

_INSTALL = f"Install it: sudo apt-get install openjdk-{JAVA_MIN}-jre-headless (or set JAVA_HOME)"


@dataclass(frozen=True, slots=True)
class Java:
    """A Java installation."""

    home: Path
    version: int

    @property
    def executable(self) -> Path:
        """The ``java`` command."""
        return self.home / "bin" / "java"


def path_option(name: str, path: Path) -> list[str]:
    """An option of a JVM that names a file or folder; none where that has spaces: Spark and RayDP split there, each in its own way."""
    return [] if any(letter.isspace() for letter in str(path)) else [f"{name}={path}"]


def find_java(minimum: int = JAVA_MIN) -> Java:
    """The Java to use: JAVA_HOME's, else the one on PATH, else one that cjdk has or fetches.

    Raises:
        SparkCompatError: there is none, or JAVA_HOME's or PATH's is older than ``minimum``.
    """
    home = os.environ.get("JAVA_HOME")
    if home:
        executable = Path(home) / "bin" / "java"
        if not executable.is_file():
            raise SparkCompatError(f"JAVA_HOME is {home}, which has no bin/java", "Correct or unset JAVA_HOME")
        return _checked(executable, "JAVA_HOME", minimum)
    on_path = shutil.which("java")
    if on_path:
        return _checked(Path(on_path).resolve(), "PATH", minimum)
    return _from_cjdk(minimum)


def export_java(java: Java) -> None:
    """Put Java into JAVA_HOME and first on PATH: RayDP calls bare ``java``, pyspark looks at JAVA_HOME."""
    os.environ["JAVA_HOME"] = str(java.home)
    folder = str(java.executable.parent)
    path = os.environ.get("PATH", "").split(os.pathsep)
    if path[0] != folder:
        os.environ["PATH"] = os.pathsep.join([folder, *path])


def _checked(executable: Path, source: str, minimum: int) -> Java:
    try:
        done = subprocess.run([executable, "-version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SparkCompatError(f"the Java of {source} does not run ({error})", _INSTALL) from error
    found = re.search(r'version "(\d+)(?:\.(\d+))?', done.stderr + done.stdout)
    if found is None:
        raise SparkCompatError(f"the Java of {source} does not tell its version", _INSTALL)
    major = int(found[2] or 0) if found[1] == "1" else int(found[1])
    if major < minimum:
        raise SparkCompatError(f"the Java of {source} is version {major}, too old: {minimum} is needed", _INSTALL)
    return Java(executable.parent.parent, major)


def _from_cjdk(minimum: int) -> Java:
    try:
        import cjdk

        home = Path(cjdk.java_home(vendor="temurin", version=str(minimum)))
    except Exception as error:
        raise SparkCompatError(f"Java {minimum} or newer is missing", _INSTALL) from error
    return _checked(home / "bin" / "java", "cjdk", minimum)
