"""The projection of tokens x [T, H] to logits [T, E], in float32 or wider whatever the model's precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from moesys.kernels.cpu import memory_pool


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


TOKENS = 512
"""Tokens that are widened at once on CPU, so that their wide copy stays in the cache."""


class _Widened(torch.autograd.Function):
    """`x · Wᵀ` in W's wider type, keeping for backward the narrow x alone."""

    @staticmethod
    def forward(ctx, x_TH, weight_EH):  # type: ignore[override]
        ctx.save_for_backward(x_TH, weight_EH)
        if _all_at_once(x_TH):
            return x_TH.to(weight_EH.dtype) @ weight_EH.t()
        return torch.cat([x.to(weight_EH.dtype) @ weight_EH.t() for x in _pieces(x_TH)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE):  # type: ignore[override]
        x_TH, weight_EH = ctx.saved_tensors
        if _all_at_once(x_TH):
            return (grad_TE @ weight_EH).to(x_TH.dtype), grad_TE.t() @ x_TH.to(weight_EH.dtype)
        grad_x, grad_weight = memory_pool.empty(x_TH.shape, x_TH.dtype), torch.zeros_like(weight_EH)
        for x, grad, out in zip(*map(_pieces, (x_TH, grad_TE, grad_x)), strict=True):
            out.copy_(grad @ weight_EH)
            grad_weight.addmm_(grad.t(), x.to(weight_EH.dtype))
        return grad_x, grad_weight


def _all_at_once(x_TH: Tensor) -> bool:
    """Whether tokens are on a GPU, placed by a compiler, or spread over devices, which pieces would bring together."""
    return x_TH.is_cuda or torch.compiler.is_compiling() or isinstance(x_TH, DTensor)


def _pieces(x_TN: Tensor) -> Sequence[Tensor]:
    return x_TN.split(TOKENS)
