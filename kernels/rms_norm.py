"""Root-mean-square norm: forward keeps x and one number per row, backward is written out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def reference(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`rms_norm` by its definition (arXiv 1910.07467), in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = x.to(wide).square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (x.to(wide) * scale * weight_H.to(wide)).to(x.dtype)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dim: [..., H] in the type of x, weight [H]."""
    if isinstance(x, DTensor):
        # Its gradient may arrive as partial sums, which only autograd's own formulas carry through.
        return reference(x, weight_H, eps)
    return _RMSNorm.apply(x, weight_H, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_H, eps):  # type: ignore[override]
        wide = torch.promote_types(x.dtype, torch.float32)
        x_wide = x.to(wide)
        mean = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square() / x.shape[-1]
        scale = (mean + eps).rsqrt()
        ctx.save_for_backward(x, weight_H, scale)
        return (x_wide * scale).mul_(weight_H.to(wide)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, weight_H, scale = ctx.saved_tensors
        x_wide, upstream = x.to(scale.dtype), grad.to(scale.dtype)
        weight = weight_H.to(scale.dtype)
        product = upstream * x_wide
        along = (product @ weight).unsqueeze(-1) * scale.square() / x.shape[-1]
        grad_x = (upstream * weight).addcmul_(x_wide, along, value=-1).mul_(scale)
        grad_weight = product.mul_(scale).sum(dim=tuple(range(x.ndim - 1)))
        return grad_x.to(x.dtype), grad_weight.to(weight_H.dtype), None
