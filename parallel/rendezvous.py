"""The rendezvous of the ranks of a run: a store on rank 0 that listens on one address alone.

With torch's own `env://` rank 0's store listens on every interface of its machine, and anybody who reaches the port may
read and write it. Here it listens on the one address that the ranks use, MASTER_ADDR.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from moesys.errors import MoesysError

EVERYWHERE = ""
"""The address of all interfaces."""

_held: list[socket.socket] = []


def listen(host: str, port: int = 0) -> socket.socket:
    """A listening socket on `host` alone; port 0: one that the system chooses.

    Raises:
        OSError: the address is none of this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(socket.SOMAXCONN)
    except BaseException:
        server.close()
        raise
    return server


def reserve(host: str) -> int:
    """Listen on `host` for the store that this process will open later; returns the port.

    So no other process can take the port in between.
    """
    while _held:
        _held.pop().close()
    _held.append(listen(host))
    port: int = _held[0].getsockname()[1]
    return port


def address_to_bind(host: str, several_nodes: bool) -> str:
    """The address of this machine on which the store of a run with MASTER_ADDR `host` listens.

    A name may resolve to loopback on its own machine (Debian's 127.0.1.1), which other nodes cannot reach. So with
    several nodes, or if the name is unknown or another machine's, the store listens on all interfaces.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        address = str(next((a for f, *_, a in found if f == socket.AF_INET), found[0][-1])[0])
        if several_nodes and ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            return EVERYWHERE
        listen(address).close()
    except OSError:
        return EVERYWHERE
    return address


def join(device: str, timeout: timedelta, env: Mapping[str, str] | None = None) -> None:
    """Join the process group that `env` describes: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun has them.

    `device` is "cuda" or "cpu", as in `enter`. `env` defaults to this process's environment, `LOCAL_WORLD_SIZE` to
    `WORLD_SIZE`. `timeout` is that of the store and of the process group. Under torchrun, which keeps a store itself,
    that one is used.

    Raises:
        torch.distributed.DistNetworkError: rank 0 cannot listen on MASTER_PORT; as torch's own store says it.
        MoesysError: another rank computes on this one's GPU.
    """
    env = os.environ if env is None else env
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or "MASTER_ADDR" not in env:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        enter(device, store, rank, world, timeout)
        return
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    if rank == 0:
        several = int(env.get("LOCAL_WORLD_SIZE", world)) < world
        store = _kept(host, port, world, several, timeout)
    else:
        store = dist.TCPStore(host, port, world, is_master=False, timeout=timeout)
    enter(device, store, rank, world, timeout)


BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
"""Backend of the process groups, by type of device."""


def enter(device: str, store: dist.Store, rank: int, world: int, timeout: timedelta) -> None:
    """Make the process group of `world` ranks that meet at `store`, for tensors on `device`: "cuda" or "cpu".

    A GPU is the current one: NCCL connects all ranks at once, and groups are split off this connection, one call for
    all groups of an axis. Otherwise each group connects on first use, and all ranks make the groups of all.

    Raises:
        MoesysError: another rank computes on this one's GPU.
    """
    if device != "cuda":
        dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=world, timeout=timeout)
        return
    own = torch.device("cuda", torch.cuda.current_device())
    claim(store, str(torch.cuda.get_device_properties(own).uuid), rank)
    dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=world, timeout=timeout, device_id=own)


def claim(store: dist.Store, gpu: str, rank: int) -> None:
    """Claim a GPU, named by its UUID, for this rank at `store`.

    Raises:
        MoesysError: another rank has claimed it.
    """
    if store.add(f"moesys/gpu/{gpu}", 1) > 1:
        place = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        rule = f"rank {rank} on {socket.gethostname()} has the same GPU as another rank ({gpu}; visible: {place})"
        remedy = "set cluster.ranks_per_node to the GPUs of a node, or give each worker its own (Slurm's gpus-per-task)"
        raise MoesysError(f"{rule}, and none is shared\n    remedy: {remedy}")


def _kept(host: str, port: int, world: int, several_nodes: bool, timeout: timedelta) -> dist.TCPStore:
    """The store in this process, on the socket that `reserve` holds for it if there is one."""
    server = next((s for s in _held if s.getsockname()[1] == port), None)
    if server is None:
        address = address_to_bind(host, several_nodes)
        try:
            server = listen(address, port)
        except OSError as error:
            taken = "EADDRINUSE, " if error.errno == errno.EADDRINUSE else ""
            said = f"the ranks cannot meet at {host}:{port}: {taken}{(error.strerror or str(error)).lower()}"
            raise dist.DistNetworkError(said) from None
    else:
        _held.remove(server)
    # The store owns the descriptor from here on, and closes it.
    return dist.TCPStore(
        host, port, world, is_master=True, timeout=timeout, master_listen_fd=server.detach(), use_libuv=True
    )
