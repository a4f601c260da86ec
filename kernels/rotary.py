"""Rotary positions: forward and backward are the same rotation, in opposite directions."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels.choose import as_type, choose, widened


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
    """Heads [B, S, h, d] rotated by the angles of `tables`; element i pairs with i + d / 2."""
    if choose(x_BShd, "rotary") == "reference":
        return reference(x_BShd, cos_Sd, sin_Sd)
    return _Rotate.apply(x_BShd, cos_Sd, sin_Sd)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _rotate(grad, *ctx.saved_tensors, -1), None, None


def _rotate(x: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, direction: int) -> Tensor:
    if choose(x, "rotary") == "triton":
        from moesys.kernels.triton import rotary as kernel

        return kernel.rotate(x, cos_Sd, sin_Sd, direction < 0)
    wide = widened(x.dtype)
    cos_S1d, sin_S1d = as_type(cos_Sd, wide).unsqueeze(1), as_type(sin_Sd, wide).unsqueeze(1)
    wide_x = as_type(x, wide)
    # Rolled by half its length, each element meets the one it is paired with.
    out = (wide_x * cos_S1d).addcmul_(wide_x.roll(x.shape[-1] // 2, -1), sin_S1d, value=direction)
    return as_type(out, x.dtype)
