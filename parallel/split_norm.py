"""A root-mean-square norm over features that tensor ranks share, such as that of all heads together (OLMoE)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesys.kernels.choose import widened
from moesys.parallel import comm


def split_rms_norm(x: Tensor, weight_F: Tensor, eps: float, group: dist.ProcessGroup) -> Tensor:
    """`moesys.kernels.rms_norm.rms_norm` of x [..., F] whose features, and their factors [F], are this rank's share.

    Each direction sums one number per row over the ranks of `group`. Collective over it.
    """
    out: Tensor = _SplitRMSNorm.apply(x, weight_F, eps, group)
    return out


class _SplitRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_F, eps, group):  # type: ignore[override]
        wide = x.to(widened(x.dtype))
        total = comm.all_reduce(wide.square().sum(-1, keepdim=True), group)
        scale = total.div(x.shape[-1] * group.size()).add(eps).rsqrt()
        ctx.group = group
        ctx.save_for_backward(x, weight_F, scale)
        return (wide * scale * weight_F.to(wide.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        x, weight_F, scale = ctx.saved_tensors
        wide, upstream = x.to(scale.dtype), grad.to(scale.dtype)
        product = upstream * wide
        weight = weight_F.to(scale.dtype)
        along = comm.all_reduce((product @ weight).unsqueeze(-1), ctx.group) * scale * scale
        grad_x = (upstream * weight - wide * (along / (x.shape[-1] * ctx.group.size()))) * scale
        grad_weight = product.flatten(0, -2).t() @ scale.flatten()
        return grad_x.to(x.dtype), grad_weight.to(weight_F.dtype), None, None
