"""Ctrl-C at the terminal of a command that ``make`` started."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_pipeline.command import running

AT_A_TERMINAL = """
import sys, time
from ray_pipeline.command.running import StopSignal
stop = StopSignal()
stop.install()
stop.started()
print("up", flush=True)
stop.event.wait()
if sys.argv[1] == "hangs":
    time.sleep(60)
print("ended in order", flush=True)
"""


class MakeAtATerminal:
    """A shell without job control at a terminal of its own; ``make`` runs a command there, then the shell reads a line."""

    def __init__(self, folder: Path, how: str) -> None:
        (folder / "command.py").write_text(AT_A_TERMINAL)
        (folder / "Makefile").write_text(f"run:\n\t@exec {sys.executable} command.py {how}\n")
        shell = 'make run; echo "make: $?"; read -r line; echo "read: $line"'
        program = f"import pty; pty.spawn(['sh', '-c', {shell!r}])"
        source = str(Path(running.__file__).parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": source, "MAKEFLAGS": ""},
        )
        self.said = ""

    def type(self, keys: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(keys)
        self._process.stdin.flush()

    def wait_for(self, text: str, deadline_s: float = 30.0) -> None:
        assert self._process.stdout is not None
        end = time.monotonic() + deadline_s
        while text not in self.said:
            left_s = end - time.monotonic()
            assert left_s > 0 and select.select([self._process.stdout], [], [], left_s)[0], self.said
            more = os.read(self._process.stdout.fileno(), 4096)
            assert more, self.said
            self.said += more.decode()

    def end(self) -> None:
        self._process.kill()  # its terminal is closed then, which ends what is left there
        self._process.communicate()


@pytest.fixture
def make_at_a_terminal(tmp_path: Path) -> Iterator[Callable[[str], MakeAtATerminal]]:
    made: list[MakeAtATerminal] = []

    def start(how: str) -> MakeAtATerminal:
        made.append(MakeAtATerminal(tmp_path, how))
        made[0].wait_for("up")
        return made[0]

    yield start
    for one in made:
        one.end()


def test_ctrl_c_ends_a_command_of_make_in_order_and_make_well(
    make_at_a_terminal: Callable[[str], MakeAtATerminal],
) -> None:
    terminal = make_at_a_terminal("ends")
    terminal.type(b"\x1a")  # Ctrl-Z, after which nobody would have the terminal
    terminal.type(b"\x03")
    terminal.wait_for("make: 0")
    assert "SIGINT: stopping in order" in terminal.said and "ended in order" in terminal.said
    terminal.type(b"on\n")
    terminal.wait_for("read: on")  # the terminal is the shell's again


def test_ctrl_c_twice_ends_a_command_of_make_at_once_and_gives_the_terminal_back(
    make_at_a_terminal: Callable[[str], MakeAtATerminal],
) -> None:
    terminal = make_at_a_terminal("hangs")
    terminal.type(b"\x03")
    terminal.wait_for("stopping in order")
    time.sleep(running._ONE_SIGNAL_MS / 1000)
    terminal.type(b"\x03")
    terminal.wait_for("make: 2")  # its own code for a command that ended with another than 0
    assert "Error 130" in terminal.said and "ended in order" not in terminal.said
    terminal.type(b"on\n")
    terminal.wait_for("read: on")
