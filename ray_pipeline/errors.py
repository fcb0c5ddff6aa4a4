"""Every error a user can meet, in one tree.

::

    RayPipelineError                 exit code 1
    ├── ConfigurationError           exit code 2: a setting is wrong; names it and the fix
    │   ├── CatalogueError           a row of the movie catalogue is malformed; names the line
    │   ├── PlanError                the text of a rate plan is malformed; names the place
    │   ├── RatingsFileError         a file of ratings is malformed; names the line
    │   └── StateMismatchError       state on disk or in Kafka belongs to another configuration
    │       └── RecordError          a record in Kafka is not what its topic holds
    ├── EnvironmentProblem           exit code 3: Java, a port, disk or CPUs are missing
    ├── BrokerUnavailableError       exit code 4: no Kafka broker answers
    │   └── NotAllowedError          it refuses this user an operation; also a DeliveryError
    ├── DeliveryError                exit code 5: records could not be delivered
    │   └── FencedError              another producer of the same shard took over
    ├── ProcessingError              exit code 6: the Spark job failed
    │   └── CheckpointError          a file of the checkpoint is broken; names it and the way out
    ├── StageFailedError             exit code 7: a stage kept failing and was given up
    └── UncheckedError               exit code 2: the audit could not compare

Errors carry fields, not only text, and survive pickling between Ray processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "BrokerUnavailableError",
    "CatalogueError",
    "CheckpointError",
    "ConfigurationError",
    "DeliveryError",
    "EnvironmentProblem",
    "FencedError",
    "NotAllowedError",
    "PlanError",
    "ProcessingError",
    "RatingsFileError",
    "RayPipelineError",
    "RecordError",
    "StageFailedError",
    "StateMismatchError",
    "UncheckedError",
]


class RayPipelineError(Exception):
    """Root of the tree.

    Args:
        problem: what is wrong, one sentence.
        fix: what to change, one sentence; may be empty.
    """

    exit_code = 1

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}. {self.fix}" if self.fix else self.problem


class ConfigurationError(RayPipelineError):
    """A setting is wrong."""

    exit_code = 2

    @classmethod
    @contextlib.contextmanager
    def reading(cls, path: Path, what: str, wanted: str, flag: str = "") -> Iterator[None]:
        """While a file that a setting names is read: this error where it is none, or cannot be read.

        Args:
            path: the file.
            what: what it is, such as ``"settings file"``.
            wanted: what kind of file to name.
            flag: the option that names it, if it is one.
        """
        try:
            if not path.is_file():
                raise cls(f"{what} {path} does not exist", f"Name an existing {wanted}")
            yield
        except OSError as error:
            another = f"name another with {flag}" if flag else "name another"
            raise cls(
                f"{what} {path} cannot be read ({error.strerror})", f"Give this user the right to read it, or {another}"
            ) from None


class CatalogueError(ConfigurationError):
    """A row of the movie catalogue is malformed."""


class PlanError(ConfigurationError, ValueError):
    """The text of a rate plan is malformed; in a record, so is the record."""


class RatingsFileError(ConfigurationError):
    """A file of ratings is malformed."""


class StateMismatchError(ConfigurationError):
    """State on disk or in Kafka belongs to another configuration."""


class RecordError(StateMismatchError, ValueError):
    """A record in Kafka is not what its topic holds: somebody else wrote it."""


class EnvironmentProblem(RayPipelineError):
    """The machine or cluster lacks something: Java, a port, disk, CPUs."""

    exit_code = 3


class BrokerUnavailableError(RayPipelineError):
    """No Kafka broker answers."""

    exit_code = 4


class DeliveryError(RayPipelineError):
    """Records could not be delivered."""

    exit_code = 5


class NotAllowedError(BrokerUnavailableError, DeliveryError):
    """The broker refuses this user an operation that is needed: trying again is no help."""


class FencedError(DeliveryError):
    """Another producer of the same shard took over, or the broker gave this one's transaction up: this one must stop."""


class ProcessingError(RayPipelineError):
    """The Spark job failed."""

    exit_code = 6


class CheckpointError(ProcessingError):
    """A file of the checkpoint is broken: starting again is no help."""


class StageFailedError(RayPipelineError):
    """A stage kept failing and was given up."""

    exit_code = 7


class UncheckedError(RayPipelineError):
    """Something that was to be compared cannot be."""

    exit_code = 2
