"""The errors of this package: what is wrong, and the fix. They survive pickling."""

from __future__ import annotations

__all__ = ["SparkCompatError"]


class SparkCompatError(Exception):
    """Java, jars, versions or the Spark session are not as they must be.

    Args:
        problem: what is wrong, one sentence.
        fix: what to do, one sentence; may be empty.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}. {self.fix}" if self.fix else self.problem
