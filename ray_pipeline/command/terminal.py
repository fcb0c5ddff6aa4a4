"""The terminal of a command that ``make`` started: ``make`` has it too, and would die of a Ctrl-C that the command survives."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import stat
from collections.abc import Callable

__all__ = ["take_terminal"]


def take_terminal() -> Callable[[], None]:
    """Where ``make`` started this command at a terminal: have Ctrl-C there reach the command alone, so that its exit code is make's.

    Ctrl-Z does nothing then: it would stop the command, but not ``make``, and so nobody would have the terminal.

    Returns:
        Gives the terminal back to ``make``; called when the process ends, unless by :func:`os._exit`.
    """
    group, own = os.getpgrp(), os.getpid()
    if "MAKELEVEL" not in os.environ or group == own or group != _foreground_group():
        return lambda: None
    if stat.S_ISFIFO(os.fstat(1).st_mode):  # who reads what we write may need the terminal, as a pager does
        return lambda: None
    for number in (signal.SIGTTOU, signal.SIGTSTP):  # the first would stop who gives a terminal that he does not have
        signal.signal(number, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.tcsetpgrp(0, own)

    def give_back() -> None:
        if _foreground_group() == own:
            with contextlib.suppress(OSError):  # neither is there any more: who started make sees to its terminal
                os.tcsetpgrp(0, group)

    atexit.register(give_back)
    return give_back


def _foreground_group() -> int | None:
    """Which process group has the terminal; None where the input is no terminal, or not this session's."""
    try:
        return os.tcgetpgrp(0)
    except OSError:
        return None
