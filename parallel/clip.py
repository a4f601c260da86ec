"""Clipping of gradients whose parameters lie on several meshes, or on none."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from moesys.parallel import comm


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[nn.Parameter], max_norm: float = inf, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The global L2 norm of all gradients, float64 []; they are scaled so that it is `max_norm` at most.

    As `torch.nn.utils.clip_grad_norm_`, which refuses parameters of several meshes, for any mixture: experts, dense
    layers under FSDP2, and plain parameters, which all ranks hold. Collective over `group`, by default the world: the
    ranks that hold the model, without other pipeline stages. Parameters without a gradient count as zeros.

        loss.backward()
        norm = moesys.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    """
    group = dist.group.WORLD if group is None and dist.is_initialized() else group
    world = 1 if group is None else group.size()
    every = list(parameters)
    held = [(p, p.grad) for p in every if p.grad is not None]
    squares = [_local(grad).double().square().sum() * _shards(p) / world for p, grad in held]
    nothing = torch.zeros((), dtype=torch.float64, device=every[0].device if every else None)
    total = torch.stack(squares).sum() if squares else nothing
    norm = (total if group is None else comm.all_reduce(total, group)).sqrt()
    factor = (max_norm / (norm + 1e-12)).clamp(max=1.0)
    for _, grad in held if max_norm < inf else ():
        _local(grad).mul_(factor.to(grad.dtype))
    return norm


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _shards(parameter: nn.Parameter) -> int:
    """Ways that a parameter is split over ranks."""
    if not isinstance(parameter, DTensor):
        return 1
    placed = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return prod(size for size, placement in placed if not isinstance(placement, Replicate))
