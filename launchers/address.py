"""HOST:PORT, as it is written for hosts of every kind."""

from __future__ import annotations


def host_and_port(address: str) -> tuple[str, int] | None:
    """The two parts of HOST:PORT, [IPv6]:PORT without its brackets; None if `address` is no such pair.

    An IPv6 address without brackets is none: nobody could tell its last part from a port.
    """
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    if not host or not (port.isascii() and port.isdigit()):
        return None
    return host, int(port)
