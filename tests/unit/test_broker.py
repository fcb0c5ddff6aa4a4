"""The embedded broker's port, where any will do."""

from __future__ import annotations

import pytest

from ray_pipeline.errors import EnvironmentProblem
from ray_pipeline.kafka import broker

LOWEST_OF_CONNECTIONS = 32_768
"""``net.ipv4.ip_local_port_range`` of Linux, as it comes."""


def test_a_free_port_is_none_that_a_connection_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {20_007, 31_999}
    monkeypatch.setattr(broker, "_free", lambda _, port: port in free)
    assert {broker._any_free_port("127.0.0.1") for _ in range(50)} == free
    assert broker._any_free_port("127.0.0.1", besides=20_007) == 31_999
    assert max(broker._PORTS) < LOWEST_OF_CONNECTIONS
    free.clear()
    with pytest.raises(EnvironmentProblem, match=r"no port of 20000 to 31999 is free.*--broker-port"):
        broker._any_free_port("127.0.0.1")
