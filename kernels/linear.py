"""A linear map in the type of its input, whose weight may be wider."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional

from moesys.kernels.choose import as_type


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x · Wᵀ + bias`: x [..., K] → [..., M], in the type of x; weight [M, K] and bias [M] of any floating type.

    Autograd would keep the narrow copy of a wider weight, half its size, for every micro-batch of a pipeline. Here
    backward casts again, which reads and writes W once: little beside the product. The copy of a DTensor, a slice of
    the weight, is kept.
    """
    bias = None if bias is None else as_type(bias, x.dtype)
    if weight.dtype == x.dtype or isinstance(weight, DTensor):
        return functional.linear(x, as_type(weight, x.dtype), bias)
    out: Tensor = _Narrowed.apply(x, weight, bias)
    return out


class _Narrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            grad @ weight.to(x.dtype) if of_x else None,
            (rows.t() @ x.flatten(0, -2)).to(weight.dtype) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
