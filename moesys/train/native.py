"""The native engine: a `Decoder` composed with the dimensions of parallelism, and torch's optimizers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesys.config.schema import Config
from moesys.errors import MoesysError
from moesys.moe.layer import MoELayer
from moesys.parallel import initialise
from moesys.parallel.compose import compose
from moesys.parallel.degrees import Degrees, resolve
from moesys.parallel.gradients import local
from moesys.parallel.mesh import ParallelMesh, Ranks
from moesys.parallel.rendezvous import join
from moesys.train import optimizer, storage
from moesys.train.engine import Update
from moesys.train.finite import nonfinite


def join_process_group(config: Config) -> tuple[Degrees, torch.device]:
    """Join the process group that the environment describes, unless already in it."""
    wanted = config.cluster.device
    cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", own_gpu(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=config.launch.timeout_s)
        join(device.type, timeout)
    if cuda and "nccl" not in dist.get_backend():
        rule = f"the ranks compute on GPUs, and their process group is of {dist.get_backend()}, which is for the CPU"
        raise MoesysError(f"{rule}\n    remedy: set cluster.device: cpu, or make the group with nccl")
    degrees, problems = resolve(config, dist.get_world_size())
    if degrees is None:
        raise MoesysError("; ".join(map(str, problems)))
    return degrees, device


def own_gpu(local_rank: int, visible: int) -> int:
    """The GPU of a worker among those it sees: its local rank, modulo their number.

    If the launcher gives each worker its own GPUs (Slurm's gpus-per-task, Ray), a worker sees only these. If two
    workers choose the same GPU, the rendezvous raises an error (`rendezvous.claim`).

    Raises:
        MoesysError: the worker sees none.
    """
    if not visible:
        rule = f"worker {local_rank} of this node computes on a GPU, as cluster.device says, and sees none"
        raise MoesysError(f"{rule}\n    remedy: set cluster.device: cpu, or give each worker a GPU")
    return local_rank % visible


def connect(config: Config) -> ParallelMesh:
    """Join the process group and build the meshes."""
    degrees, device = join_process_group(config)
    return ParallelMesh(degrees, device, config.launch.timeout_s)


def build(
    config: Config, mesh: Ranks, vocab_size: int, dtype: torch.dtype | None = None, draw: bool = True
) -> NativeEngine:
    """The engine on this rank; `dtype` is the type of the weights, default float32; `draw`: see `EngineModule`."""
    assert isinstance(mesh, ParallelMesh)
    return NativeEngine(config, mesh, vocab_size, dtype, draw)


class NativeEngine:
    """See `Engine`. `torch.distributed.checkpoint` saves every tensor by its parameter's name."""

    def __init__(
        self,
        config: Config,
        mesh: ParallelMesh,
        vocab_size: int,
        dtype: torch.dtype | None = None,
        draw: bool = True,
    ):
        self.config, self.mesh, self.dtype = config, mesh, dtype or torch.float32
        self.model = compose(config, mesh, vocab_size, dtype, draw)
        self.optimizer = optimizer.build(config.train.optimizer, self.model.named_parameters(), self.model.decays)
        self._loss = torch.zeros((), device=mesh.device)

    def train(self, tokens: Tensor, labels: Tensor, samples: range) -> Tensor:
        """See `Engine.train`. tokens, labels: int64 [B, S]."""
        loss = self._loss = self.model.train(tokens, labels, samples)
        self.model.gradients.reduce()
        return loss

    def later_losses(self) -> Tensor:
        """See `Engine.later_losses`."""
        found = self.model.loss.take()
        return torch.zeros(self.config.model.predicted, device=self.mesh.device) if found is None else found

    def update(self, rate: float) -> Update:
        """See `Engine.update`."""
        gradients = self.model.gradients
        norm, loss = gradients.norm(self._loss)
        skipped = ~(norm.isfinite() & loss.isfinite())
        gradients.clip(self.config.train.optimizer.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        optimizer.step(self.optimizer, skipped)
        self.model.after_step(skipped)
        self.optimizer.zero_grad()
        return Update(norm, skipped, partial(self._bad, gradients.norms))

    def _bad(self, norms_P: Tensor) -> list[str]:
        """Names of the trained parameters whose gradients' norms are not finite."""
        names = {id(p): name for name, p in self.model.named_parameters().items()}
        fine = norms_P.isfinite().tolist()
        return [names[id(p)] for p, is_fine in zip(self.model.gradients.parameters, fine, strict=True) if not is_fine]

    def nonfinite(self) -> list[str]:
        """See `Engine.nonfinite`."""
        state = self._state()
        kept = {name: value for name, value in state["optimizer"].items() if value.ndim}
        return nonfinite({name: local(value) for name, value in (state["model"] | kept).items()})

    def evaluate(self, tokens: Tensor, labels: Tensor, samples: Sequence[int]) -> Tensor:
        """See `Engine.evaluate`. tokens, labels: int64 [B, S]."""
        return self.model.evaluate(tokens, labels, samples)

    def moe_layers(self) -> dict[str, MoELayer]:
        """See `Engine.moe_layers`."""
        return self.model.moe_layers()

    def gradients(self) -> dict[str, Tensor]:
        """See `Engine.gradients`."""
        trained = {name: p for name, p in self.model.named_parameters().items() if p.requires_grad}
        return {name: _whole(p.grad) for name, p in trained.items() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        """See `Engine.weights`."""
        found = self.model.named_parameters() | self.model.named_buffers()
        return {name: _whole(value) for name, value in found.items()}

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        storage.save(self._state(), folder)

    def load(self, folder: Path) -> set[str]:
        """See `Engine.load`."""
        return storage.load(self._state(), folder, optional={f"model.{name}" for name in self.model.named_buffers()})

    def held(self) -> Iterator[tuple[str, Tensor, tuple[slice, ...]]]:
        """See `Engine.held`."""
        for name, value in (self.model.named_parameters() | self.model.named_buffers()).items():
            yield name, *initialise.held(value.detach())

    def written(self) -> None:
        """See `Engine.written`: the optimizer updates the weights themselves."""

    def load_weights(self, folder: Path) -> set[str]:
        """See `Engine.load_weights`."""
        buffers = self.model.named_buffers()
        state: dict[str, Any] = {name: p.detach() for name, p in self.model.named_parameters().items()} | buffers
        return storage.load({"model": state}, folder, optional={f"model.{name}" for name in buffers})

    def _state(self) -> dict[str, Any]:
        parameters = self.model.named_parameters()
        if not self.optimizer.state:
            self._allocate()
        slots = {
            f"{name}/{slot}": value
            for name, p in parameters.items()
            if p.requires_grad
            for slot, value in dict(self.optimizer.state)[p].items()  # a parameter without state is a bug: KeyError
            if isinstance(value, Tensor)
        }
        model = {name: p.detach() for name, p in parameters.items()} | self.model.named_buffers()
        return {"model": model, "optimizer": slots}

    def _allocate(self) -> None:
        """Make the optimizer create its state by a step with zero gradients. It changes nothing and is not counted."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for kept in self.optimizer.state.values():
            kept["step"].zero_()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()
