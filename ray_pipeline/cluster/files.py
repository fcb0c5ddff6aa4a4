"""Files that settings name, for actors on any node: through Ray's object store, so that no disk need be shared."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ray_pipeline.cluster.kept import Kept
from ray_pipeline.config import Settings
from ray_pipeline.errors import EnvironmentProblem

__all__ = ["SharedFiles"]

_SHARED = ("catalog", "model")


@dataclass(frozen=True)
class SharedFiles:
    """What the driver has read, once, for all actors.

    Attributes:
        held: by setting, the digest of the file's content, and the content.
    """

    held: dict[str, tuple[str, Kept]] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings) -> SharedFiles:
        """Read the files that the settings name, and put them in the object store."""
        held = {}
        for name in _SHARED:
            path: Path | None = getattr(settings, name)
            if path is not None:
                content = path.read_bytes()
                held[name] = (hashlib.sha256(content).hexdigest(), Kept.put(np.frombuffer(content, np.uint8)))
        return cls(held)

    def at_hand(self, settings: Settings) -> Settings:
        """The settings for an actor: where its node lacks a file, or has another content, they name a copy.

        Raises:
            EnvironmentProblem: the copy cannot be written.
        """
        copies = {}
        for name, (digest, content) in self.held.items():
            path: Path = getattr(settings, name)
            if not _has(path, digest):
                copies[name] = _copy(f"ray-pipeline-{digest[:32]}{path.suffix}", digest, content)
        return settings.model_copy(update=copies)


def _has(path: Path, digest: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except OSError:
        return False


def _copy(name: str, digest: str, content: Kept) -> Path:
    path = Path(tempfile.gettempdir()) / name
    if _has(path, digest):
        return path
    unfinished = path.with_name(f"{name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(content.get().tobytes())
        unfinished.replace(path)
    except OSError as error:
        raise EnvironmentProblem(
            problem=f"a copy of a file for the actors cannot be written to {path} ({error.strerror})",
            fix="Free some space there, or set TMPDIR",
        ) from None
    return path
