"""Gradients summed over a group of ranks in flat buckets of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesys.parallel import comm
from moesys.parallel.cost import BUCKET_BYTES


def local(x: Tensor) -> Tensor:
    """The part of a (possibly distributed) tensor that this rank holds. x may have any shape."""
    return x.to_local() if isinstance(x, DTensor) else x


def divided(params: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Consecutive parameters of one type, whose gradients have at most `BUCKET_BYTES` together."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for p in params:
        nbytes = local(p.detach()).nbytes
        if not buckets or size + nbytes > BUCKET_BYTES or buckets[-1][0].dtype != p.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += nbytes
    return buckets


class Bucket:
    """Gradients of `params`, summed over `group` in one all-reduce.

    Gradients become views of the bucket's memory, so that each is copied once. A gradient that is alone in its bucket
    is summed in place.

    Attributes:
        awaited: ids of the parameters whose gradients backward has not completed.
    """

    def __init__(self, params: Sequence[nn.Parameter], group: dist.ProcessGroup, tag: comm.Tag = comm.GRADIENTS):
        self.params, self.group, self.tag = params, group, tag
        self.awaited = set(map(id, params))
        self._pending: comm.Work | None = None

    @torch.no_grad()
    def start(self) -> None:
        """Start the sum; a missing gradient is zero."""
        grads = [local(completed(p)) for p in self.params]
        if len(grads) == 1 and grads[0].is_contiguous():
            flat = grads[0].view(-1)
            _replace(self.params[0], grads[0])  # a term of the sum, laid out as one, becomes the sum
        else:
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            pieces = flat.split([grad.numel() for grad in grads])
            for p, grad, piece in zip(self.params, grads, pieces, strict=True):
                _replace(p, piece.view(grad.shape))
        self._pending = comm.start_all_reduce(flat, self.group, self.tag)

    def wait(self) -> None:
        """Wait for the sum; the bucket is then ready for the next step."""
        assert self._pending is not None
        self._pending.wait()
        self._pending = None
        self.awaited = set(map(id, self.params))


def completed(p: nn.Parameter) -> Tensor:
    """The gradient of p, zeros if there is none; with the placements of p, unless it is partial and p is replicated."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    elif (
        isinstance(p, DTensor) and isinstance(p.grad, DTensor) and not _partial(p) and p.grad.placements != p.placements
    ):
        p.grad = p.grad.redistribute(placements=p.placements)
    return p.grad


def _partial(p: nn.Parameter) -> bool:
    """Whether p is replicated over its mesh, and its gradient a partial sum."""
    if not isinstance(p, DTensor) or not isinstance(p.grad, DTensor) or p.device_mesh.ndim > 1:
        return False
    return p.placements[0].is_replicate() and p.grad.placements[0].is_partial("sum")


def _replace(p: nn.Parameter, grad: Tensor) -> None:
    """Make `grad` this rank's part of the gradient of p, with the placements of p."""
    if isinstance(p, DTensor):
        grad = DTensor.from_local(grad, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    p.grad = grad


@torch.no_grad()
def sum_partial(params: Iterable[nn.Parameter]) -> None:
    """Sum partial gradients over the ranks that replicate their parameters."""
    found: dict[str, tuple[dist.ProcessGroup, list[nn.Parameter]]] = {}
    for p in params:
        if _partial(p) and isinstance(p, DTensor):
            group = p.device_mesh.get_group()
            found.setdefault(group.group_name, (group, []))[1].append(p)
    buckets = [Bucket(some, group, comm.UNTAGGED) for group, every in found.values() for some in divided(every)]
    for bucket in buckets:
        bucket.start()
    for bucket in buckets:
        bucket.wait()
