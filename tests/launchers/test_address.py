"""HOST:PORT, with every kind of host."""

from __future__ import annotations

import socket

import pytest

from moesys.errors import LaunchError
from moesys.launchers import ray_cluster
from moesys.launchers.address import host_and_port


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("head:6379", ("head", 6379)),
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("[::1]:6399", ("::1", 6399)),
        ("[fe80::1%eth0]:6399", ("fe80::1%eth0", 6399)),
        ("::1:6399", None),
        ("auto", None),
        (":6379", None),
        ("[]:1", None),
        ("head:", None),
        ("head:६", None),
    ],
)
def test_the_two_parts(address, parts):
    assert host_and_port(address) == parts


def test_a_cluster_on_ipv6_is_reached():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        ray_cluster.check_reachable(f"[::1]:{server.getsockname()[1]}")


@pytest.mark.parametrize("address", ["::1:6399", "head:port", "127.0.0.1:70000", "a\0b:1", f"{'a' * 300}:1"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(LaunchError, match="remedy"):
        ray_cluster.check_reachable(address)
