"""Rotary positions: forward and backward are the same rotation, in opposite directions."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(x_BShd: Tensor, cos_Sr: Tensor, sin_Sr: Tensor) -> Tensor:
    """`rotate` by its definition (RoFormer, arXiv 2104.09864), in float32 or wider."""
    wide = torch.promote_types(x_BShd.dtype, torch.float32)
    first, second = x_BShd.to(wide).chunk(2, dim=-1)
    cos, sin = cos_Sr[None, :, None].to(wide), sin_Sr[None, :, None].to(wide)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BShd.dtype)


def rotate(x_BShd: Tensor, cos_Sr: Tensor, sin_Sr: Tensor) -> Tensor:
    """Heads [B, S, h, d] turned by the angles of cos, sin [S, d / 2]; element i pairs with i + d / 2."""
    return _Rotate.apply(x_BShd, cos_Sr, sin_Sr)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    wide, half = torch.promote_types(x.dtype, torch.float32), x.shape[-1] // 2
    cos, sin = (angle[None, :, None].to(wide) for angle in (cos, sin))
    wide_x = x.to(wide)
    # Rolled by half its length, each element meets the one it is paired with.
    across = torch.cat((-direction * sin, direction * sin), -1)
    return (wide_x * torch.cat((cos, cos), -1)).addcmul_(wide_x.roll(half, -1), across).to(x.dtype)
