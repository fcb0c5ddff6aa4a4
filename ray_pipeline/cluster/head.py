"""Which Ray cluster is meant, and whether anybody is at its address. Ray itself tries for two minutes to join one that is not there."""

from __future__ import annotations

import os
import socket

from ray_pipeline.errors import EnvironmentProblem

__all__ = ["named_cluster", "require_head", "unanswered"]

_CONNECT_S = 3.0


def named_cluster(address: str | None) -> str | None:
    """The Ray cluster to join: the one that is given, else RAY_ADDRESS; None where neither names one, as ``local`` does not."""
    named = address or os.environ.get("RAY_ADDRESS")
    return None if named in ("", "local") else named


def require_head(address: str) -> None:
    """Make sure that somebody answers at a cluster's address.

    Raises:
        EnvironmentProblem: nobody does within three seconds.
    """
    why = unanswered(address, _CONNECT_S)
    if why:
        raise EnvironmentProblem(
            problem=f"the Ray cluster at {address} cannot be joined: nobody answers ({why})",
            fix="Check that it runs (ray start --head starts one), and --ray-address or RAY_ADDRESS",
        )


def unanswered(address: str, timeout_s: float) -> str:
    """Why nobody answers at a cluster's address; empty when somebody does, or where it names no port, such as ``auto``."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return ""
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
