"""What is kept of micro-batches between forward and backward, by size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesys.kernels.cpu import memory_pool
from moesys.parallel.schedules import TorchStage


def plain(x: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank."""
    if isinstance(x, DTensor):
        x = x._local_tensor
    return getattr(x, "elem", x)  # of what is still on its way


def storage(x: Tensor) -> int:
    """The identity of a tensor's storage. Its address will not do: FSDP frees what it gathered, and the next tensor may
    lie there."""
    return plain(x).untyped_storage()._cdata


class Allocated(TorchDispatchMode):
    """Knows every storage that was allocated inside, with the type and shape of its first tensor, and keeps none alive.

    It sees what hooks of saved tensors do not: the results that selective recomputation holds, inputs of checkpoints,
    outputs of pipeline stages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {storage(x) for x in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            if storage(x) not in before:
                local = plain(x)
                name = f"{str(local.dtype).removeprefix('torch.')} {list(local.shape)} of {func}"
                # The reference keeps the identity from being used again, but not the bytes.
                self.found[storage(x)] = StorageWeakRef(local.untyped_storage()), name
        return out

    def alive(self, leaving_out: set[int]) -> dict[str, int]:
        """Bytes of what has not been freed, by type and shape."""
        sizes: dict[str, int] = {}
        for place, (reference, name) in self.found.items():
            if place not in leaving_out and (held := torch.UntypedStorage._new_with_weak_ptr(reference.cdata)):
                sizes[name] = sizes.get(name, 0) + held.nbytes()
        return sizes


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type != "meta")


def beside(part: Any) -> set[int]:
    """Storages of a part's weights, of their gradients, of what FSDP holds of both, and of its tables of positions."""
    found = [table for pair in (part._tables or ({}, {}))[1].values() for table in pair]
    found += [x for p in part.parameters() for x in (p, p.grad)]
    for module in part.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            for p in group.fsdp_params:
                found += [*p.all_gather_outputs, p.unsharded_accumulated_grad]
    return {storage(x) for x in found if x is not None}


def kept(trainer: Any) -> dict[str, int]:
    """Bytes that are kept of a micro-batch between forward and backward, by type and shape. Collective.

    Weights, and what FSDP gathered, are left out; the loss keeps the logits, as their gradient.
    """
    model, t = trainer.engine.model, trainer.config.train
    (part,) = model.parts
    tokens = torch.randint(
        0, trainer.vocab_size, (t.micro_batch, t.seq_len), generator=torch.Generator().manual_seed(0)
    )
    numbered, labels = model._mine(tokens, tokens, range(t.micro_batch))
    with memory_pool.recorded(), Allocated() as allocated:  # else freed results would lie in the pool
        loss = model.loss(part(numbered[..., 1], numbered), labels)
        sizes = allocated.alive(beside(part))
    loss.backward()
    trainer.engine.optimizer.zero_grad()
    for layer in trainer.engine.moe_layers().values():
        layer.statistics.take()
    return sizes


def kept_in_flight(trainer: Any) -> dict[str, int]:
    """Bytes that are kept at the fullest moment of a step of a pipeline, by type and shape. Collective.

    Moments are the ends of a rank's forward and backward passes. Buffers of what stages send each other are included,
    so that the step must be the trainer's first.
    """
    parts, fullest = trainer.engine.model.parts, dict[str, int]()
    allocated = Allocated()

    def measured(work: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal fullest
            out = work(*arguments, **more)
            now = allocated.alive(set().union(*map(beside, parts)))
            if sum(now.values()) > sum(fullest.values()):
                fullest = now
            return out

        return call

    with ExitStack() as stack:
        for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
            stack.enter_context(mock.patch.object(TorchStage, name, measured(getattr(TorchStage, name))))
        stack.enter_context(memory_pool.recorded())
        stack.enter_context(allocated)
        trainer.train_step()
    return fullest
