"""Who may control the generator."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

__all__ = ["ControlGate", "Refused", "is_loopback"]


class Refused(Exception):
    """A control request was refused; the text says why.

    Args:
        status: HTTP status, 401 or 403.
        reason: why.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address is this machine's loopback."""
    if host is None:
        return False
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class ControlGate:
    """Lets requests of this machine pass, and others that bring the token; none that another web site caused.

    A browser says in ``Origin`` which page sends a request, and in ``Host`` which name was looked up: a foreign origin, or a foreign
    name for a loopback address (DNS rebinding), is another site's doing.

    Args:
        token: what others must bring.
        own_ports: ports of API and dashboard: pages from there may send.
    """

    def __init__(self, token: str, own_ports: tuple[int, ...]) -> None:
        self._token = token.encode()
        self.own_ports = own_ports

    def admit(self, client: str | None, headers: Mapping[str, str]) -> None:
        """Let an HTTP request pass, or raise; the token comes as ``Authorization: Bearer`` or ``X-Control-Token``.

        Args:
            client: address the request comes from.
            headers: its headers; names in lower case, or a mapping that does not mind.

        Raises:
            Refused: it may not.
        """
        token = headers.get("x-control-token")
        authorization = headers.get("authorization", "")
        if authorization.lower().startswith("bearer "):
            token = authorization[7:]
        self.check(client, headers.get("host"), headers.get("origin"), token)

    def check(self, client: str | None, host: str | None, origin: str | None, token: str | None) -> None:
        """Let pass, or raise.

        Args:
            client: address the request comes from.
            host: its ``Host`` header.
            origin: its ``Origin`` header; None when there is none, as with curl.
            token: the token it brings.

        Raises:
            Refused: it may not.
        """
        name, port = _address(f"//{host or ''}")
        if origin is not None:
            page, page_port = _address(origin)
            same_host = page is not None and (page == name or (is_loopback(page) and is_loopback(name)))
            if not same_host or page_port not in (*self.own_ports, port):
                raise Refused(403, f"cross-site request from {origin[:200]}")
        if token is not None:
            if hmac.compare_digest(token.encode(), self._token):
                return
            raise Refused(401, "the token is wrong")
        if not is_loopback(client):
            raise Refused(401, "from another machine a token is needed: header Authorization: Bearer TOKEN")
        if not is_loopback(name):
            raise Refused(403, f"host {(host or 'missing')[:200]} is not this machine")


def _address(url: str) -> tuple[str | None, int | None]:
    """Host and port that a URL names; None where it names none.

    Raises:
        Refused: it is no URL.
    """
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.port
    except ValueError:
        raise Refused(403, f"{url[:200]} is no address") from None
