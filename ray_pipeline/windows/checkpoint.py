"""Whether the newest files of a checkpoint are whole. Pure: who calls it does the reading.

Spark writes ``offsets/N`` before micro-batch N (where it ends in each partition), and ``commits/N`` after it. A crash of the machine,
or a full disk below a file system that does not report it, can leave the newest ones empty or cut off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["BrokenFile", "find_broken", "state_problem"]

_FOLDERS = ("offsets", "commits")
_CLEAR = (
    "Clear checkpoint and topics with: ray-pipeline reset, and remove a checkpoint outside the state directory yourself"
)
_READ_BY_SPARK = 2  # a start reads the newest file and the one before


@dataclass(frozen=True, slots=True)
class BrokenFile:
    """A file that Spark cannot go on from.

    Attributes:
        name: path in the checkpoint, such as ``offsets/17``; ``state/17`` for what batch 17 left in the state store.
        reason: what is wrong with it.
        newest: whether it belongs to the newest batch, which can be worked out again.
    """

    name: str
    reason: str
    newest: bool

    @property
    def way_out(self) -> str:
        """What to do, in one sentence."""
        folder, batch = self.name.split("/")
        if not self.newest:
            return _CLEAR
        # a batch without its commit is worked out again, from the state of the batch before
        files = f"offsets/{batch} and commits/{batch} (if there)" if folder == "offsets" else f"commits/{batch}"
        return (
            f"Remove {files}, with the .crc files beside: batch {batch} is then worked out again and nothing is skipped. "
            f"Or: {_CLEAR}"
        )


def find_broken(names: Callable[[str], Iterable[str]], read: Callable[[str], str]) -> BrokenFile | None:
    """The first broken one among the files that Spark reads when it starts.

    Args:
        names: lists a folder of the checkpoint; empty when it is not there.
        read: the text of a file; raises ValueError when it cannot be read as such.
    """
    batches = {folder: sorted(int(name) for name in names(folder) if name.isdigit()) for folder in _FOLDERS}
    newest = max((batch for found in batches.values() for batch in found), default=-1)
    for folder in _FOLDERS:
        for batch in reversed(batches[folder][-_READ_BY_SPARK:]):
            name = f"{folder}/{batch}"
            try:
                _check(read(name), lines=2 if folder == "offsets" else 1)
            except ValueError as error:
                return BrokenFile(name, str(error), batch == newest)
    return None


def state_problem(text: str) -> str | None:
    """The line of an error of Spark that says that a file of the state store is broken or gone; None when it is another error."""
    signs = (
        "EOFException",
        "CANNOT_LOAD_STATE_STORE",
        "ChecksumException",
        "FileNotFoundException",
        "Stream is corrupted",
    )
    if any(sign in text for sign in ("No space left on device", "OutOfMemoryError", "UNRELEASED_THREAD")):
        return None  # it could not be loaded now
    lines = [line.strip().removeprefix("Caused by: ") for line in text.splitlines() if any(s in line for s in signs)]
    return lines[-1][:300] if lines else None


def _check(text: str, lines: int) -> None:
    """A version, then so many lines of JSON."""
    version, *rest = text.splitlines() or [""]
    if not version.startswith("v") or len(rest) < lines:
        msg = "it is cut off" if text else "it is empty"
        raise ValueError(msg)
    for line in rest[:lines]:
        try:
            json.loads(line)
        except ValueError:
            msg = "it is cut off"
            raise ValueError(msg) from None
