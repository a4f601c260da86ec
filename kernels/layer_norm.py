"""Layer norm with a weight and a bias: of a narrow x forward keeps x and two numbers per row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional

from moesys.kernels.choose import widened

aten = torch.ops.aten


def reference(x: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
    """`layer_norm` by its definition (arXiv 1607.06450), in float32 or wider. x [..., H]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    scale = centred.square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (centred * scale * weight_H.to(wide) + bias_H.to(wide)).to(x.dtype)


def layer_norm(x: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
    """(x − mean(x)) / √(var(x) + eps) · weight + bias over the last dim: [..., H] in the type of x, the rest [H]."""
    if isinstance(x, DTensor):
        # Its gradient may arrive as partial sums, which only autograd's own formulas carry through.
        return reference(x, weight_H, bias_H, eps)
    if x.dtype == weight_H.dtype == bias_H.dtype:
        return functional.layer_norm(x, weight_H.shape, weight_H, bias_H, eps)
    out: Tensor = _Widened.apply(x, weight_H, bias_H, eps)
    return out


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_H, bias_H, eps):  # type: ignore[override]
        wide = widened(x.dtype)
        out, mean, scale = torch.native_layer_norm(x.to(wide), weight_H.shape, weight_H.to(wide), bias_H.to(wide), eps)
        ctx.save_for_backward(x, weight_H, bias_H, mean, scale)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        x, weight_H, bias_H, mean, scale = ctx.saved_tensors
        wide = mean.dtype
        grads = aten.native_layer_norm_backward(
            grad.to(wide), x.to(wide), weight_H.shape, mean, scale, weight_H.to(wide), bias_H.to(wide), [True] * 3
        )
        of_x, of_weight, of_bias = grads
        return of_x.to(x.dtype), of_weight.to(weight_H.dtype), of_bias.to(bias_H.dtype), None
