"""Free ports of this machine, where any will do."""

from __future__ import annotations

import random
import socket
from collections.abc import Container

from ray_pipeline.errors import EnvironmentProblem

__all__ = ["any_free_port", "is_free", "why_not_free"]

_PORTS = range(20_000, 32_000)
"""Where they are looked for: below those that Linux gives to connections, one of which may take a port that was free a moment ago,
or that of a broker that was killed, before anybody listens there."""


def any_free_port(host: str, besides: Container[int] = ()) -> int:
    """A port that nobody listens at.

    Args:
        host: address to listen at.
        besides: ports that are promised already.

    Raises:
        EnvironmentProblem: there is none.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        if port not in besides and is_free(host, port):
            return port
    raise EnvironmentProblem(
        problem=f"no port of {_PORTS.start} to {_PORTS.stop - 1} is free on {host}",
        fix="Name others with --broker-port, --api-port and --ui-port",
    )


def is_free(host: str, port: int) -> bool:
    """Whether somebody could listen there now."""
    return why_not_free(host, port) is None


def why_not_free(host: str, port: int) -> str | None:
    """What the system says to who would listen there now; None where he could."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
        return None
