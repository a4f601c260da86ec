"""Emulated hosts: the nodes of a cluster as network namespaces of this machine, joined by links of a given rate.

This rehearses several nodes on one machine. Traffic inside a host is as fast as this machine; traffic between hosts
crosses a bridge, through links that the kernel slows down. It needs Linux and root.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

from moesys import leftovers
from moesys.errors import LaunchError
from moesys.launchers.local import LocalWorkers
from moesys.launchers.spec import RunSpec
from moesys.words import plural

INTERFACE = "eth0"
"""The network interface of a host, inside its namespace."""

MTU = 9000
"""Bytes of a packet, as on the networks of clusters: headers then take less than a hundredth of the rate."""

BURST_S = 2e-3
"""Seconds of the rate that may pass at once: the kernel's timer is no finer."""

WINDOW = 2**19
"""Bytes that a connection may have in flight: a queue before a slow link delays the answers that come back."""

INSIDE = ["sh", "-c", 'exec ip netns exec "$MOESYS_NETNS" "$@"', "--"]
"""Before a command: run it on the host that the environment names."""

_numbers = itertools.count()


def unavailable() -> str | None:
    """The reason why this machine cannot emulate hosts; None if it can."""
    if sys.platform != "linux":
        return "emulated hosts are network namespaces, which only Linux has"
    if os.geteuid() != 0:
        return "emulated hosts need root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"emulated hosts need {' and '.join(missing)} (package iproute2)"
    probe = f"moesys{os.getpid()}probe"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return f"this machine makes no network namespaces: {done.stderr.strip()}" if done.returncode else None


class Hosts:
    """`count` hosts on one bridge; each sends, and each receives, `gbit` · 10⁹ bits per second at most.

    They exist inside a `with`. The next process removes what a killed one left behind.

    Raises:
        LaunchError: this machine cannot have them.
    """

    def __init__(self, count: int, gbit: float | None = None):
        self.count, self.gbit = count, gbit
        self._name = f"ms{os.getpid()}x{next(_numbers)}"
        self._owned: leftovers.OwnedResources | None = None

    def __enter__(self) -> Hosts:
        if why := unavailable():
            raise LaunchError(why)
        self._owned = leftovers.OwnedResources("hosts")
        self._owned.network(self._name)
        try:
            _run(f"ip link add {self._name} mtu {MTU} type bridge")
            _run(f"ip link set {self._name} up")
            for host in range(self.count):
                self._add(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def namespace(self, host: int) -> str:
        """The name of a host's network namespace."""
        return f"{self._name}h{host}"

    def address(self, host: int) -> str:
        """The host's IP address, which the other hosts reach."""
        return f"10.213.0.{host + 1}"

    def environment(self, host: int) -> dict[str, str]:
        """The environment of a process that `INSIDE` starts on the host."""
        return {
            "MOESYS_NETNS": self.namespace(host),
            "MOESYS_NODE_IP": self.address(host),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
        }

    def close(self) -> None:
        """Remove the hosts and their links. Harmless twice."""
        if self._owned is not None:
            self._owned.remove()

    def _add(self, host: int) -> None:
        name, outside = self.namespace(host), f"{self._name}v{host}"
        _run(f"ip netns add {name}")
        _run(f"ip link add {outside} mtu {MTU} type veth peer name {INTERFACE} mtu {MTU} netns {name}")
        _run(f"ip link set {outside} master {self._name} up")
        inside = f"ip netns exec {name} "
        _run(f"{inside}ip address add {self.address(host)}/24 dev {INTERFACE}")
        _run(f"{inside}ip link set {INTERFACE} up")
        _run(f"{inside}ip link set lo up")
        for buffer in ("tcp_rmem", "tcp_wmem"):
            _run([*inside.split(), "sysctl", "-qw", f"net.ipv4.{buffer}=4096 {WINDOW} {WINDOW}"])
        if self.gbit is not None:
            burst = max(10 * MTU, round(self.gbit * 1e9 / 8 * BURST_S))
            limit = f"root tbf rate {round(self.gbit * 1e9)}bit burst {burst} latency 2s"
            _run(f"{inside}tc qdisc add dev {INTERFACE} {limit}")
            _run(f"tc qdisc add dev {outside} {limit}")


class HostWorkers(LocalWorkers):
    """The workers of a run on emulated hosts, one for each node of its cluster."""

    def __init__(self, spec: RunSpec, command: Sequence[str] | None = None):
        super().__init__(spec, command)
        self.command = [*INSIDE, *self.command]
        self.hosts = Hosts(spec.config.cluster.nodes, spec.config.launch.link_gbit)

    def start(self, phase: Callable[[str], None]) -> None:
        """Make the hosts, then start the workers as `LocalWorkers` does."""
        phase(f"making {plural(self.hosts.count, 'host')}")
        self.hosts.__enter__()
        super().start(phase)

    def stop(self) -> None:
        """End the workers and remove the hosts."""
        super().stop()
        self.hosts.close()

    def refuse(self) -> None:
        """Accept any number of nodes."""

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """The environment of the worker of `rank` on its host; rank 0 will listen on `port`."""
        per_host = self.spec.config.cluster.ranks_per_node
        host, place = divmod(rank, per_host)
        own = {"LOCAL_RANK": str(place), "LOCAL_WORLD_SIZE": str(per_host), "MASTER_ADDR": self.hosts.address(0)}
        return super().environment(rank, port) | own | self.hosts.environment(host)


def _run(command: str | list[str]) -> None:
    words = command.split() if isinstance(command, str) else command
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"emulated hosts: `{' '.join(words)}` failed: {done.stderr.strip()}")
