"""The versions that were measured to work together, and whether the installed ones are these."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

__all__ = [
    "HADOOP",
    "JAVA_MIN",
    "KAFKA",
    "PYTHON_PACKAGES",
    "SCALA",
    "SLF4J",
    "SPARK",
    "VersionProblem",
    "check_versions",
]

SPARK = "4.2.0"
SCALA = "2.13"
KAFKA = "4.3.1"
SLF4J = "1.7.36"
HADOOP = "3.5.0"
JAVA_MIN = 17

PYTHON_PACKAGES = {"pyspark": SPARK, "raydp": "1.7.0b20260911.dev0", "ray": "2.60.0"}
"""Packages whose versions belong together."""


@dataclass(frozen=True, slots=True)
class VersionProblem:
    """A package whose version is not the one that belongs to the others."""

    package: str
    installed: str | None
    wanted: str


def check_versions() -> list[VersionProblem]:
    """Every package of :data:`PYTHON_PACKAGES` that is missing or of another version."""
    problems = []
    for package, wanted in PYTHON_PACKAGES.items():
        try:
            installed: str | None = version(package)
        except PackageNotFoundError:
            installed = None
        if installed != wanted:
            problems.append(VersionProblem(package, installed, wanted))
    return problems
