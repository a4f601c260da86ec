"""Experts: grouped gated feed-forwards over tokens sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesys.kernels.grouped_matmul import grouped_matmul


def local(weight: Tensor) -> Tensor:
    """What this device holds of a weight: experts compute on their own slice, wherever the rest lies."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class Experts(nn.Module):
    """E SwiGLU feed-forwards, `down(silu(gate(x)) · up(x))`, without biases.

    Weights: gate, up [E, H, F] and down [E, F, H]. Under expert parallelism a device holds a slice
    of E, and of F; the arithmetic is the same.
    """

    def __init__(self, experts: int, hidden: int, ffn_hidden: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, hidden, ffn_hidden))
        self.up = nn.Parameter(torch.empty(experts, hidden, ffn_hidden))
        self.down = nn.Parameter(torch.empty(experts, ffn_hidden, hidden))

    def forward(self, rows_NH: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Outputs [N, H] of rows [N, H] sorted by expert; `tokens_per_expert` int64 [E], sum N.

        Any count, and N itself, may be 0: gradients of the weights are then zeros, not None, so that
        every device takes part in every collective that follows.
        """
        gate, up, down = (local(w).to(rows_NH.dtype) for w in (self.gate, self.up, self.down))
        gated = grouped_matmul(rows_NH, gate, tokens_per_expert)
        inner = nn.functional.silu(gated) * grouped_matmul(rows_NH, up, tokens_per_expert)
        return grouped_matmul(inner, down, tokens_per_expert)
