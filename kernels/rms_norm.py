"""Root-mean-square norm: forward keeps x and one number per row, backward is written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesys.kernels.choose import as_type, widened


def reference(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`rms_norm` by its definition (arXiv 1910.07467), in float32 or wider. x [..., H]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = x.to(wide).square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (x.to(wide) * scale * weight_H.to(wide)).to(x.dtype)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dim: [..., H] in the type of x, weight [H]."""
    if isinstance(x, DTensor):
        # Its gradient may arrive as partial sums, which only autograd's own formulas carry through.
        return reference(x, weight_H, eps)
    if x.is_cuda and x.dtype == weight_H.dtype:
        # One kernel there, in float32 inside. Of two types torch would compute step by step, and keep each.
        return nn.functional.rms_norm(x, weight_H.shape, weight_H, eps)
    return _RMSNorm.apply(x, weight_H, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_H, eps):  # type: ignore[override]
        x_wide, weight = _widened(widened(x.dtype), x, weight_H)
        norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, scale)
        return as_type((x_wide * scale).mul_(weight), x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, weight_H, scale = ctx.saved_tensors
        x_wide, weight, upstream = _widened(scale.dtype, x, weight_H, grad)
        product = upstream * x_wide
        along = (product @ weight).unsqueeze_(-1).mul_(scale).mul_(scale)
        grad_x = (upstream * weight).addcmul_(x_wide, along, value=-1 / x.shape[-1]).mul_(scale)
        # A product with a vector reads once, and sums as it does.
        grad_weight = product.flatten(0, -2).t() @ scale.flatten()
        return as_type(grad_x, x.dtype), as_type(grad_weight, weight_H.dtype), None


def _widened(wide: torch.dtype, x: Tensor, weight_H: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type to compute in. Where they are of it, nothing is called: small steps would feel it."""
    if x.dtype == weight_H.dtype == wide:
        return x, weight_H, *more  # a gradient has the type of x
    return tuple(t.to(wide) for t in (x, weight_H, *more))
