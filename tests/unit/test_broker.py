"""The embedded broker's port, from one start to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.kafka import broker as broker_module
from ray_pipeline.kafka.broker import EmbeddedBroker

FREE = 20_007


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(broker_module, "any_free_port", lambda _: FREE)
    (tmp_path / "broker").mkdir()
    return tmp_path / "broker"


def chosen(folder: Path, port: int = 0) -> int:
    broker = EmbeddedBroker(folder.parent, port)
    broker._choose_port()
    found = int(broker.bootstrap_servers.rpartition(":")[2])
    assert (folder / "port").read_text() == str(found)
    return found


@pytest.mark.parametrize("left", [None, b"", b"2", b"20x", b"\xff\xfe", b"-1", b"0", b"70000", b"1" * 5_000])
def test_a_port_that_a_full_disk_left_broken_is_not_remembered(
    folder: Path, left: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "is_free", lambda _, port: port == FREE)
    if left is not None:
        (folder / "port").write_bytes(left)
    assert chosen(folder) == FREE


def test_the_port_of_the_last_time_is_taken_again_while_it_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {20_001, FREE}
    monkeypatch.setattr(broker_module, "is_free", lambda _, port: port in free)
    (folder / "port").write_text("20001\n")
    assert chosen(folder) == 20_001
    free.remove(20_001)
    assert chosen(folder) == FREE
    free.add(20_001)
    assert chosen(folder, 20_001) == 20_001
