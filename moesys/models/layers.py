"""The small layers that blocks are built of.

Weights may be wider than the stream that passes through (float32 weights, bfloat16 stream): each
layer computes in the type of its input. B sequences, S tokens, H hidden, F inner size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.kernels.activation import KINDS
from moesys.kernels.linear import linear
from moesys.kernels.rms_norm import rms_norm


class Linear(nn.Linear):
    """A linear map computed in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """The map of x [..., inputs]: [..., outputs]."""
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim (arXiv 1910.07467), computed in float32 or wider; starts as ones."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the weight its initial values."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x [..., H], in its shape."""
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """Feed-forward `down(act(gate(x)) · up(x))`, by default SwiGLU (arXiv 2002.05202): [B, S, H] → same.

    Without a gate it is `down(act(up(x)))`. `activation` is a kind of `moesys.kernels.activation`.
    """

    def __init__(self, hidden: int, ffn_hidden: int, activation: str = "swiglu"):
        super().__init__()
        self.kind = KINDS[activation]
        if self.kind.gated:
            self.gate_proj = Linear(hidden, ffn_hidden, bias=False)
        self.up_proj = Linear(hidden, ffn_hidden, bias=False)
        self.down_proj = Linear(ffn_hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if not self.kind.gated:
            return self.down_proj(self.kind.value(up))
        up = up if self.kind.linear is None else self.kind.linear(up)
        return self.down_proj(self.kind.value(self.gate_proj(x)) * up)
