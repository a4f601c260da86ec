"""Rotary positions: forward and backward are the same rotation, in opposite directions."""

from __future__ import annotations

import torch
from torch import Tensor


def tables(angles_Sr: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, d] of what `rotate` turns each element by, those of the first half negative.

    `angles_Sr` [S, d / 2] are the angles of a head's pairs. Made once for all layers.
    """
    cos, sin = angles_Sr.cos(), angles_Sr.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def reference(x_BShd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """`rotate` by its definition (RoFormer, arXiv 2104.09864), in float32 or wider."""
    wide, half = torch.promote_types(x_BShd.dtype, torch.float32), x_BShd.shape[-1] // 2
    first, second = x_BShd.to(wide).chunk(2, dim=-1)
    cos, sin = (table[None, :, None, half:].to(wide) for table in (cos_Sd, sin_Sd))
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BShd.dtype)


def rotate(x_BShd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Heads [B, S, h, d] turned by the angles of `tables`; element i pairs with i + d / 2."""
    return _Rotate.apply(x_BShd, cos_Sd, sin_Sd)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, direction: int) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos_Sd[None, :, None].to(wide), sin_Sd[None, :, None].to(wide)
    wide_x = x.to(wide)
    # Rolled by half its length, each element meets the one it is paired with.
    return (wide_x * cos).addcmul_(wide_x.roll(x.shape[-1] // 2, -1), sin, value=direction).to(x.dtype)
