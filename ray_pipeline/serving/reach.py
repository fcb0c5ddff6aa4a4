"""Under which URL a server is reached: what it listens at need be none, such as ``0.0.0.0``, which is every address of the machine."""

from __future__ import annotations

import ipaddress
import socket

__all__ = ["is_everywhere", "told", "url_of"]


def is_everywhere(host: str) -> bool:
    """Whether whoever listens at a host name or address does so at all addresses of the machine."""
    try:
        return ipaddress.ip_address(host or "0.0.0.0").is_unspecified
    except ValueError:
        return False


def url_of(host: str, port: int) -> str:
    """The URL on this machine of a server that listens at ``host``."""
    if is_everywhere(host):
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def told(url: str, host: str) -> str:
    """A URL of :func:`url_of` as people are told it: where others may reach the server, with the name of this machine."""
    if not is_everywhere(host):
        return url
    return f"{url} (from elsewhere: http://{socket.gethostname()}:{url.rpartition(':')[2]})"
