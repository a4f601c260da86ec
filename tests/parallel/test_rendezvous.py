"""Where ranks meet: on one address, at a port that nobody else can take."""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support import listening

from moesys.errors import MoesysError
from moesys.parallel import rendezvous

TIMEOUT = timedelta(seconds=60)


def environment(rank: int, port: int, **more: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}


def test_the_store_listens_on_its_address_alone() -> None:
    port = rendezvous.reserve("127.0.0.1")
    with pytest.raises(OSError):  # held from the start: nobody can come in between
        rendezvous.listen("127.0.0.1", port)
    other = threading.Thread(target=lambda: dist.TCPStore("127.0.0.1", port, 2, False, timeout=TIMEOUT).set("a", "b"))
    other.start()
    store = rendezvous._kept("127.0.0.1", port, 2, False, TIMEOUT)
    other.join()
    assert store.get("a") == b"b"
    assert listening([os.getpid()]).keys() == {"127.0.0.1"}
    del store
    rendezvous.listen("127.0.0.1", port).close()  # nobody does any more


def test_a_taken_port_is_told_as_torch_tells_it() -> None:
    with rendezvous.listen("127.0.0.1") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            dist.DistNetworkError, match=f"cannot meet at 127.0.0.1:{port}: EADDRINUSE, address already"
        ):
            rendezvous.join("cpu", TIMEOUT, environment(0, port))


@pytest.mark.parametrize(
    ("host", "several", "address"),
    [
        ("127.0.0.1", False, "127.0.0.1"),
        ("localhost", False, "127.0.0.1"),
        ("localhost", True, rendezvous.EVERYWHERE),
        ("192.0.2.77", True, rendezvous.EVERYWHERE),
        ("no-such-host.invalid", False, rendezvous.EVERYWHERE),
    ],
)
def test_the_address_is_one_that_the_other_ranks_reach(host: str, several: bool, address: str) -> None:
    assert rendezvous.address_to_bind(host, several) == address


def test_torchruns_own_store_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    called, store = [], dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda url, **more: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: called.append((backend, more)))
    rendezvous.join("cpu", TIMEOUT, environment(0, 1, TORCHELASTIC_USE_AGENT_STORE="True"))
    assert called == [("gloo", {"store": store, "rank": 0, "world_size": 2, "timeout": TIMEOUT})]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Two GPUs that are not there; what the process group is made with."""
    called: list[dict] = []
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: called.append({"backend": backend, **more}))
    return called


def test_nccl_connects_all_ranks_at_once(gpus) -> None:
    torch.cuda.set_device(1)
    rendezvous.enter("cuda", dist.HashStore(), 0, 2, TIMEOUT)
    assert gpus[0]["backend"] == "nccl" and gpus[0]["device_id"] == torch.device("cuda", 1)


def test_ranks_that_come_to_one_gpu_are_told(gpus) -> None:
    store = dist.HashStore()
    rendezvous.enter("cuda", store, 0, 3, TIMEOUT)
    torch.cuda.set_device(1)
    rendezvous.enter("cuda", store, 1, 3, TIMEOUT)
    with pytest.raises(MoesysError, match=r"rank 2 on .* has the same GPU as another rank \(GPU-1; .*\n    remedy: "):
        rendezvous.enter("cuda", store, 2, 3, TIMEOUT)


def test_ipv6_addresses_are_listened_on() -> None:
    if not socket.has_ipv6:
        return
    with rendezvous.listen("::1") as server:
        assert server.getsockname()[0] == "::1"
