"""The rendezvous of the workers of Ray Train, and the variables that they get only once they run.

Ray Train's own backend for torch finds a free port, releases it, and lets the store of rank 0 listen there on every
interface. Here rank 0's process listens on its node's address alone, and keeps that socket for the store. Ranks join in
the worker's own code, as with every other launcher.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from moesys.launchers.ray_worker import WorkerTask, node_address, train_loop


class Rendezvous(TorchConfig):
    """Replaces Ray Train's way to a process group."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend that Ray Train starts."""
        return RendezvousBackend


class RendezvousBackend(Backend):
    """Tells all workers where rank 0 listens."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called in Ray Train's controller when all workers stand."""
        meeting = worker_group.execute_single(0, listen_here)
        worker_group.execute(set_environment, meeting)


def set_environment(variables: Mapping[str, str]) -> None:
    """Called in every worker."""
    os.environ.update(variables)


def listen_here() -> dict[str, str]:
    """Called in the worker of rank 0: the variables that name its address and the port it listens on."""
    from moesys.parallel.rendezvous import reserve  # the launching process must not import torch

    address = node_address()
    return {"MASTER_ADDR": address, "MASTER_PORT": str(reserve(address))}


def loop(late: Mapping[str, str], task: WorkerTask) -> None:
    """Called in each worker: `train_loop(task)` with its rank and `late` in the environment.

    Nothing writes `late` down, whereas Ray logs the environment that it is asked for.
    """
    from ray.train import get_context

    context = get_context()
    place = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "NODE_RANK": context.get_node_rank(),
    }
    os.environ.update({name: str(number) for name, number in place.items()} | dict(late))
    train_loop(task)
