"""After backward: one true gradient per parameter, its global norm, and clipping."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from math import inf, prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from moesys.moe.layer import moe_layers
from moesys.parallel import comm
from moesys.parallel.mesh import ParallelMesh

BUCKET_BYTES = 64 * 2**20
"""Gradients are summed in flat buckets of about this size: large messages, bounded copies."""


def local(x: Tensor) -> Tensor:
    """The part of a (possibly distributed) tensor that this rank holds."""
    return x.to_local() if isinstance(x, DTensor) else x


class Gradients:
    """The gradients of the parts of a model on this rank; frozen parameters have none.

    Args:
        parts: the model's stages on this rank, after `compose`.
        mesh: the run's meshes.
        tied: (parameter, group) of a weight that two pipeline stages hold, or None.
    """

    def __init__(
        self, parts: list[nn.Module], mesh: ParallelMesh, tied: tuple[nn.Parameter, dist.ProcessGroup] | None = None
    ):
        self.mesh, self.tied = mesh, tied
        layers = (layer for part in parts for layer in moe_layers(part).values())
        experts = {id(p) for layer in layers for p in layer.experts.parameters()}
        every = {id(p): p for part in parts for p in part.parameters()}.values()
        self.parameters = [p for p in every if p.requires_grad]
        d = mesh.degrees
        dense_axes = () if d.dp_shard > 1 else ("dp_replicate", "dp_shard", "cp")
        expert_axes = () if d.edp_shard > 1 else ("edp_replicate", "edp_shard")
        dense = [p for p in self.parameters if id(p) not in experts]
        self._replicated = [
            (params, group)
            for params, axes in ((dense, dense_axes), (self._experts(experts), expert_axes))
            if (group := mesh.group(*axes)) is not None
        ]
        self._copies = [self._copies_of(p) for p in self.parameters]
        self.norms = torch.zeros(0, device=mesh.device)
        """Of this rank's parts of the gradients, in the parameters' order, as `norm` found them: [P]."""

    def _experts(self, ids: set[int]) -> list[nn.Parameter]:
        return [p for p in self.parameters if id(p) in ids]

    def _copies_of(self, p: nn.Parameter) -> int:
        """Ranks that hold the same values as this rank's part of p."""
        sharded = 1
        if isinstance(p, DTensor):
            sizes = zip(p.device_mesh.shape, p.placements, strict=True)
            sharded = prod(size for size, placement in sizes if not isinstance(placement, Replicate))
        both_ends = 2 if self.tied is not None and self.tied[0] is p else 1
        return self.mesh.degrees.stage // sharded * both_ends

    def reduce(self) -> None:
        """Sum what is still spread: partial sums over tp, replicas, and a weight tied across stages."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif isinstance(p, DTensor) and isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
                p.grad = p.grad.redistribute(placements=p.placements)
        for params, group in self._replicated:
            _sum([local(p.grad) for p in params if p.grad is not None], group)
        if self.tied is not None and self.tied[0].grad is not None:
            _sum([local(self.tied[0].grad)], self.tied[1])

    def norm(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The true global L2 norm of all gradients, over all dimensions of parallelism, and the sum of `loss`.

        Both float64 [] on the device. Each rank adds the squares of what it holds, divided by how many ranks hold the
        same: one all-reduce of two numbers, whatever the layout, and no wait of the host. `loss`: this rank's share.
        """
        grads = [local(p.grad) for p in self.parameters if p.grad is not None]
        squares = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
        if grads:
            self.norms = torch.stack(torch._foreach_norm(grads))
            squares = (self.norms.double().square() / self._copies_P).sum()
        whole, total = comm.total(torch.stack([squares, loss.double()]), way=comm.STEP)
        return whole.sqrt(), total

    @cached_property
    def _copies_P(self) -> Tensor:
        return torch.tensor(self._copies, device=self.mesh.device, dtype=torch.float64)

    def clip(self, limit: float | None, norm: Tensor) -> None:
        """Scale the gradients, whose global norm is `norm`, so that it becomes `limit` at most."""
        grads = [local(p.grad) for p in self.parameters if p.grad is not None]
        if grads and limit is not None and limit < inf:
            factor = (limit / (norm + 1e-12)).clamp(max=1.0)
            for dtype in {grad.dtype for grad in grads}:
                torch._foreach_mul_([grad for grad in grads if grad.dtype == dtype], factor.to(dtype))


def _sum(grads: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce in flat buckets, all under way at once."""
    buckets: list[list[Tensor]] = []
    size = BUCKET_BYTES
    for grad in grads:
        if size + grad.nbytes > BUCKET_BYTES or buckets[-1][0].dtype != grad.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(grad)
        size += grad.nbytes
    flat = [torch.cat([g.reshape(-1) for g in bucket]) for bucket in buckets]
    started = [comm.start_total(f, group, comm.GRADIENTS) for f in flat]
    for bucket, whole, pending in zip(buckets, flat, started, strict=True):
        pending.wait()
        for grad, part in zip(bucket, whole.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(part.view_as(grad))
