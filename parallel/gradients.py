"""After backward: one true gradient per parameter, its global norm, and clipping.

Gradients of parameters that several ranks hold are summed in buckets, each as soon as backward has completed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf, prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from moesys.moe.layer import moe_layers
from moesys.parallel import comm
from moesys.parallel.buckets import Bucket, completed, divided, sum_partial
from moesys.parallel.buckets import local as local
from moesys.parallel.data import routers
from moesys.parallel.mesh import ParallelMesh


class Gradients:
    """The gradients of the parts of a model on this rank; frozen parameters have none.

    Every rank of a group starts the same buckets in the same order, whatever its tokens: a bucket waits for those
    before it. Two kinds of parameters come last. Routers get no gradient where routing is forced, and all others would
    wait for them. Parameters that are replicated over tensor ranks may have partial sums as gradients.

    Args:
        parts: the model's stages on this rank, after `compose`.
        mesh: the run's meshes.
        tied: (parameter, group) of a weight that two pipeline stages hold, or None.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        mesh: ParallelMesh,
        tied: tuple[nn.Parameter, dist.ProcessGroup] | None = None,
    ):
        self.mesh, self.tied = mesh, tied
        every = {id(p): p for part in parts for p in part.parameters()}.values()
        self.parameters = [p for p in every if p.requires_grad]
        copies = [self._copies_of(p) for p in self.parameters]
        self._copies_P = torch.tensor(copies, device=mesh.device, dtype=torch.float64)
        self.norms = torch.zeros(0, device=mesh.device)
        """Norms [P] of this rank's parts of the gradients, in the parameters' order, as `norm` found them."""
        routing = {id(p) for part in parts for p in routers(part)}
        groups = self._groups(parts, routing)
        late = [p for p in self.parameters if id(p) in routing or _whole_over_tensor_ranks(p)]
        early = {id(p) for p in self.parameters} - set(map(id, late))
        orders = [_backwards(part, early) for part in parts]
        orders[0] += late  # backward completes the first part last
        of_parts = [_buckets(params, groups) for params in orders]
        self._early = [[b for b in buckets if b.awaited <= early] for buckets in of_parts]
        self._late = [b for b in of_parts[0] if not b.awaited <= early]
        # Backward completes the last of several stages first.
        self._queue = [bucket for buckets in reversed(self._early) for bucket in buckets]
        self._started, self._completing = 0, False
        for bucket in self._queue:
            for p in bucket.params:
                p.register_post_accumulate_grad_hook(partial(self._complete, bucket))

    def _groups(self, parts: Sequence[nn.Module], routing: set[int]) -> dict[int, dist.ProcessGroup]:
        """Group of the ranks that hold the same slice for other tokens, by the id of each parameter that FSDP skips."""
        layers = (layer for part in parts for layer in moe_layers(part).values())
        experts = {id(p) for layer in layers for p in layer.experts.parameters()}
        d = self.mesh.degrees
        dense = [p for p in self.parameters if id(p) not in experts and (d.dp_shard == 1 or id(p) in routing)]
        routed = self._experts(experts) if d.edp_shard == 1 else []
        axes = ("dp_replicate", "dp_shard", "cp"), ("edp_replicate", "edp_shard")
        found: dict[int, dist.ProcessGroup] = {}
        for params, group in zip((dense, routed), (self.mesh.group(*a) for a in axes), strict=True):
            found |= {id(p): group for p in params if group is not None}
        return found

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

    @contextmanager
    def last_backward(self, part: int) -> Iterator[None]:
        """Context of the backward pass that completes the gradients of this part; their sums start one by one.

        With a pipeline's split backward it is the last pass that computes gradients of weights.
        """
        self._completing = True
        yield
        self._completing = False
        for bucket in self._early[part]:
            bucket.awaited.clear()
        self._advance()

    def _complete(self, bucket: Bucket, p: nn.Parameter) -> None:
        """Start the sums that are due; autograd calls it after it has added to the gradient of p."""
        if self._completing:
            bucket.awaited.discard(id(p))
            self._advance()

    def _advance(self) -> None:
        while self._started < len(self._queue) and not self._queue[self._started].awaited:
            self._queue[self._started].start()
            self._started += 1

    def reduce(self) -> None:
        """Complete all sums: partial sums over tp, over replicas, and of a weight that two stages share.

        Every parameter has a gradient afterwards.
        """
        for bucket in self._queue:
            bucket.awaited.clear()
        self._advance()
        sum_partial(self.parameters)
        for bucket in self._late:
            bucket.start()
        for p in self.parameters:
            completed(p)
        for bucket in (*self._queue, *self._late):
            bucket.wait()
        self._started = 0
        if self.tied is not None:
            bucket = Bucket([self.tied[0]], self.tied[1])
            bucket.start()
            bucket.wait()

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
        whole, total = comm.all_reduce(torch.stack([squares, loss.double()]), tag=comm.STEP)
        return whole.sqrt(), total

    def clip(self, limit: float | None, norm: Tensor) -> None:
        """Scale the gradients, whose global norm is `norm`, so that it becomes `limit` at most. `norm` is a scalar."""
        grads = [local(p.grad) for p in self.parameters if p.grad is not None]
        if grads and limit is not None and limit < inf:
            factor = (limit / (norm + 1e-12)).clamp(max=1.0)
            for dtype in {grad.dtype for grad in grads}:
                torch._foreach_mul_([grad for grad in grads if grad.dtype == dtype], factor.to(dtype))


def _whole_over_tensor_ranks(p: nn.Parameter) -> bool:
    return isinstance(p, DTensor) and any(isinstance(placement, Replicate) for placement in p.placements)


def _backwards(part: nn.Module, ids: set[int]) -> list[nn.Parameter]:
    """The parameters of `part` among `ids`, the last first: about the order in which backward completes gradients."""
    return [p for p in reversed(list(part.parameters())) if id(p) in ids]


def _buckets(params: Iterable[nn.Parameter], groups: dict[int, dist.ProcessGroup]) -> list[Bucket]:
    """Buckets of the parameters that a group sums, in the order in which they are complete."""
    by_group: dict[dist.ProcessGroup, list[nn.Parameter]] = {}
    place = {}
    for number, p in enumerate(params):
        place[id(p)] = number
        if id(p) in groups:
            by_group.setdefault(groups[id(p)], []).append(p)
    found = [Bucket(some, group) for group, every in by_group.items() for some in divided(every)]
    return sorted(found, key=lambda bucket: place[id(bucket.params[-1])])
