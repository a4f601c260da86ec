"""Addresses: HOST:PORT, as it is written for hosts of every kind, and that of the Ray cluster to join."""

from __future__ import annotations

import os
from collections.abc import Mapping


def ray_address(configured: str | None, env: Mapping[str, str] | None = None) -> str | None:
    """The Ray cluster to join: `launch.ray_address`, else the one this process was submitted to, else None."""
    env = os.environ if env is None else env
    if configured is not None:
        return configured
    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in env
    return env.get("RAY_ADDRESS") or ("auto" if inside_job else None)


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
