"""From tokens x [T, H] to logits [T, E], in float32 or wider whatever the model's precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moesys.kernels import recycle


class GateProjection(nn.Linear):
    """`x · Wᵀ`, plus a learned bias [E] if there is one (GPT-OSS)."""

    def __init__(self, hidden: int, experts: int, bias: bool = False):
        super().__init__(hidden, experts, bias=bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        if wide == x_TH.dtype:
            return nn.functional.linear(x_TH, self.weight.to(wide), bias)
        logits_TE: Tensor = _Widened.apply(x_TH, self.weight.to(wide))
        return logits_TE if bias is None else logits_TE + bias


PIECE = 2**18
"""Elements of x that are widened at once on CPU: their wide copy stays in a core's second-level cache."""


def _pieces(x_TH: Tensor) -> Sequence[Tensor]:
    """Parts of the tokens that are widened one after another; all together where a compiler or a GPU does better."""
    if x_TH.is_cuda or torch.compiler.is_compiling():
        return (x_TH,)
    return x_TH.split(max(1, PIECE // max(1, x_TH.shape[1])))


class _Widened(torch.autograd.Function):
    """`x · Wᵀ` in W's wider type, keeping for backward the narrow x alone."""

    @staticmethod
    def forward(ctx, x_TH, weight_EH):  # type: ignore[override]
        ctx.save_for_backward(x_TH, weight_EH)
        return torch.cat([x.to(weight_EH.dtype) @ weight_EH.t() for x in _pieces(x_TH)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE):  # type: ignore[override]
        x_TH, weight_EH = ctx.saved_tensors
        grad_x, grad_weight = recycle.empty_like(x_TH), torch.zeros_like(weight_EH)
        start = 0
        for x in _pieces(x_TH):
            some = slice(start, start := start + len(x))
            grad_x[some] = grad_TE[some] @ weight_EH
            grad_weight.addmm_(grad_TE[some].t(), x.to(weight_EH.dtype))
        return grad_x, grad_weight
