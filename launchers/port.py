"""A TCP port for the rendezvous of workers on this machine, reserved until they meet.

The usual way, to bind port 0 and release it, leaves a gap in which the kernel may give the same port to
any connection. Instead the port lies below the kernel's range for such, and a lock that lives as long as
this object keeps other launches away from it. (torch's own store, given an open socket, would do
without; but then rank 0 would be started unlike the others.)
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

from moesys.errors import LaunchError

LOWEST = 20000
KERNEL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class ReservedPort:
    """A free port, `number`, reserved among all launches on this machine until closed."""

    def __init__(self, attempts: int = 200):
        first_of_kernel = int(KERNEL_RANGE.read_text().split()[0]) if KERNEL_RANGE.exists() else 32768
        highest = max(first_of_kernel, LOWEST + 1000)
        for _ in range(attempts):
            self.number = random.randrange(LOWEST, highest)
            self._lock = lock(self.number)
            if self._lock and is_free(self.number):
                return
            self.close()
        raise LaunchError(f"no free TCP port between {LOWEST} and {highest} in {attempts} attempts")

    def close(self) -> None:
        """Give the reservation up."""
        if self._lock:
            self._lock.close()


def lock(port: int) -> socket.socket | None:
    """A name among Linux's abstract sockets, which the kernel frees when this process ends; None if taken."""
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        holder.bind(f"\0moesys-port-{port}")
    except (FileNotFoundError, PermissionError, ValueError):
        return holder  # no abstract names outside Linux: go without the lock
    except OSError:
        holder.close()
        return None
    return holder


def is_free(port: int) -> bool:
    """True if nothing listens on `port` on any address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
