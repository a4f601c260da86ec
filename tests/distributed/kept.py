"""What autograd keeps of one micro-batch, by size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def plain(x: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank."""
    if isinstance(x, DTensor):
        x = x._local_tensor
    return getattr(x, "elem", x)  # of what is still on its way


def storage(x: Tensor) -> int:
    """The identity of a tensor's storage. Its address will not do: FSDP frees what it gathered, and the next tensor may
    lie there."""
    return x.untyped_storage()._cdata


def kept(trainer: Any) -> dict[str, int]:
    """Bytes that autograd keeps of a micro-batch between forward and backward, by type and shape. Collective.

    Weights, and what FSDP gathered, are left out; the loss keeps the logits, as their gradient.
    """
    model, t = trainer.engine.model, trainer.config.train
    (part,) = model.parts
    tokens = torch.randint(
        0, trainer.vocab_size, (t.micro_batch, t.seq_len), generator=torch.Generator().manual_seed(0)
    )
    numbered, labels = model._mine(tokens, tokens, range(t.micro_batch))
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        local = plain(x)
        found.setdefault(storage(local), local)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = part(numbered[..., 1], numbered)
        weights = {storage(plain(p)) for p in part.parameters()}
        for module in part.modules():
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
                for p in group.fsdp_params:
                    weights |= {storage(out) for out in p.all_gather_outputs}
    loss = model.loss(logits, labels)
    found[storage(plain(logits))] = plain(logits)
    sizes: dict[str, int] = {}
    for place, x in found.items():
        if place not in weights:
            name = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            sizes[name] = sizes.get(name, 0) + x.untyped_storage().nbytes()
    loss.backward()
    trainer.engine.optimizer.zero_grad()
    for layer in trainer.engine.moe_layers().values():
        layer.statistics.take()
    return sizes
