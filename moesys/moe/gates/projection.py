"""From tokens x [T, H] to logits [T, E], in float32 or wider whatever the model's precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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


class _Widened(torch.autograd.Function):
    """`x · Wᵀ` in W's wider type, keeping for backward the narrow x alone."""

    @staticmethod
    def forward(ctx, x_TH, weight_EH):  # type: ignore[override]
        ctx.save_for_backward(x_TH, weight_EH)
        return x_TH.to(weight_EH.dtype) @ weight_EH.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE):  # type: ignore[override]
        x_TH, weight_EH = ctx.saved_tensors
        return (grad_TE @ weight_EH).to(x_TH.dtype), grad_TE.t() @ x_TH.to(weight_EH.dtype)
