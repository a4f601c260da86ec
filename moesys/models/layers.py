"""The small layers that blocks are built of.

Weights may be wider than the stream that passes through (float32 weights, bfloat16 stream): each
layer computes in the type of its input. B sequences, S tokens, H hidden, F inner size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.kernels.activation import KINDS
from moesys.kernels.layer_norm import layer_norm
from moesys.kernels.linear import linear
from moesys.kernels.rms_norm import rms_norm


class Linear(nn.Linear):
    """A linear map computed in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """The map of x [..., inputs]: [..., outputs]."""
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim (arXiv 1910.07467), computed in float32 or wider.

    Its factors are the weight, which starts as ones, or, if it is `centered`, 1 + the weight, which starts as zeros.
    """

    def __init__(self, size: int, eps: float, centered: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.centered = eps, centered
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the weight its initial values."""
        nn.init.constant_(self.weight, 0.0 if self.centered else 1.0)

    def factors(self) -> Tensor:
        """What features are multiplied by [H]."""
        return 1 + self.weight if self.centered else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x [..., H], in its shape."""
        return rms_norm(x, self.factors(), self.eps)


class LayerNorm(nn.Module):
    """Layer norm over the last dim (arXiv 1607.06450), computed in float32 or wider; starts as ones and zeros."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give both their initial values."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x [..., H], in its shape."""
        return layer_norm(x, self.weight, self.bias, self.eps)


def norm(kind: str, size: int, eps: float) -> RMSNorm | LayerNorm:
    """A norm of the stream, of a kind of `model.norm`."""
    return LayerNorm(size, eps) if kind == "layer" else RMSNorm(size, eps, kind == "rms_zero_centered")


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
