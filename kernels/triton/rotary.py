"""Rotary positions in one pass: each element is read once and written once.

B sequences, S tokens, h heads of size d. Arithmetic in float32, or in float64 of float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesys.kernels.triton.launch import on_its_device
from moesys.kernels.triton.permute import wide

ELEMENTS = 2048
"""Pairs that a program rotates at once."""


@triton.jit
def _rotate_kernel(
    x_BShd, cos_Sd, sin_Sd, out_BShd, sequence, heads, half, stride_B, stride_S, stride_h,
    BACK: tl.constexpr, WIDE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    s = token % sequence
    h_B1 = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    d_1D = tl.arange(0, BLOCK_D)[None, :]
    there = d_1D < half
    inside = (h_B1 < heads) & there
    # The tables' second halves: in the first the sines are negative.
    table = s * 2 * half + half + d_1D
    cos = tl.load(cos_Sd + table, mask=there, other=0.0).to(WIDE)
    sin = tl.load(sin_Sd + table, mask=there, other=0.0).to(WIDE)
    if BACK:
        sin = -sin
    at = x_BShd + token // sequence * stride_B + s * stride_S + h_B1 * stride_h + d_1D
    first = tl.load(at, mask=inside, other=0.0).to(WIDE)
    second = tl.load(at + half, mask=inside, other=0.0).to(WIDE)
    to = out_BShd + (token * heads + h_B1) * 2 * half + d_1D
    tl.store(to, (first * cos - second * sin).to(out_BShd.dtype.element_ty), mask=inside)
    tl.store(to + half, (second * cos + first * sin).to(out_BShd.dtype.element_ty), mask=inside)


@torch.library.custom_op("moesys::rotate", mutates_args=())
@on_its_device
def rotate(x_BShd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, back: bool) -> Tensor:
    """x rotated by the angles of the tables, or `back`: [B, S, h, d] in the type of x, contiguous.

    Args:
        x_BShd: floating, d even.
        cos_Sd: floating, of `moesys.kernels.rotary.tables`, and so is sin.
    """
    batch, sequence, heads, size = x_BShd.shape
    x_BShd = x_BShd if x_BShd.stride(-1) == 1 else x_BShd.contiguous()
    cos_Sd, sin_Sd = cos_Sd.contiguous(), sin_Sd.contiguous()
    out = x_BShd.new_empty(x_BShd.shape)
    if out.numel():
        block_d = triton.next_power_of_2(size // 2)
        block_h = min(triton.next_power_of_2(heads), max(1, ELEMENTS // block_d))
        _rotate_kernel[batch * sequence, triton.cdiv(heads, block_h)](
            x_BShd, cos_Sd, sin_Sd, out, sequence, heads, size // 2, *x_BShd.stride()[:3],
            BACK=back, WIDE=wide(x_BShd), BLOCK_H=block_h, BLOCK_D=block_d,
        )  # fmt: skip
    return out


@rotate.register_fake
def _(x_BShd, cos_Sd, sin_Sd, back):
    return x_BShd.new_empty(x_BShd.shape)
