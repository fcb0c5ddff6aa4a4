"""Ray's token authentication, for processes that join a cluster."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["present_token"]


def present_token() -> None:
    """Have Ray show this user's token, if there is one, to the cluster that is joined next.

    Ray does so by itself for a cluster that it starts, not for one that it joins. To be called before Ray is imported.
    """
    places = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    has_token = any(os.environ.get(name) for name in places) or (Path.home() / ".ray" / "auth_token").is_file()
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
