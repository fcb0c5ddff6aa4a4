"""Ports, where any will do."""

from __future__ import annotations

import pytest

from ray_pipeline import ports
from ray_pipeline.errors import EnvironmentProblem

LOWEST_OF_CONNECTIONS = 32_768
"""``net.ipv4.ip_local_port_range`` of Linux, as it comes."""


def test_a_free_port_is_none_that_a_connection_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {20_007, 31_999}
    monkeypatch.setattr(ports, "is_free", lambda _, port: port in free)
    assert {ports.any_free_port("127.0.0.1") for _ in range(50)} == free
    assert ports.any_free_port("127.0.0.1", besides=(20_007,)) == 31_999
    assert max(ports._PORTS) < LOWEST_OF_CONNECTIONS
    free.clear()
    with pytest.raises(EnvironmentProblem, match=r"no port of 20000 to 31999 is free.*--broker-port"):
        ports.any_free_port("127.0.0.1")
