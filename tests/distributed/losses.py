"""What `test_loss` asks worker processes to do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moesys.parallel import comm, loss
from moesys.parallel.loss import TokenLoss

VOCAB, TOKENS = 24, 40


def some(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [T, V], some far apart, and labels, some of them ignored."""
    torch.manual_seed(0)
    labels = torch.randint(VOCAB, (14,))
    labels[3:6] = loss.IGNORED
    return torch.randn(14, VOCAB).mul(30).to(dtype), labels


def split(rank: int) -> dict[str, dict[str, Any]]:
    """The loss of this rank's slice, its gradient, what travelled, and the loss without a gradient."""
    axis = DeviceMesh("cpu", list(range(dist.get_world_size())))
    loss.LOSS_CHUNK = 5 * VOCAB // 2
    found = {}
    for name, dtype in (("float64", torch.float64), ("bfloat16", torch.bfloat16)):
        logits, labels = some(dtype)
        leaf = logits.chunk(2, 1)[rank].clone().requires_grad_()
        function = TokenLoss(TOKENS, axis)
        with comm.record() as events:
            value = function((leaf * 1)[None], labels[None])
            value.backward()
        with torch.no_grad():
            evaluated = function(leaf[None], labels[None])
        assert leaf.grad is not None
        found[name] = {
            "loss": value.detach(),
            "evaluated": evaluated,
            "grad": leaf.grad,
            "travelled": [(e.kind, e.bytes) for e in events],
        }
    return found
