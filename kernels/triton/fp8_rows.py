"""Rows in eight bits with a scale for every block, written and read in one pass each.

N rows of H elements in blocks of b, as `moesys.parallel.dispatchers.payload.Fp8Rows` lays them out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesys.kernels.triton.launch import on_its_device

BLOCKS = 8
"""Blocks of a row that a program works on at once."""


@triton.jit
def _rounded(x):
    """x float32 to the nearest number of eight bits, of two the even one: conversion need not round."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # Of numbers of this size float32 has three bits behind the first: what is below is rounded off.
    large = tl.maximum(power, 0.015625) * 1572864.0
    return (x + large) - large


@triton.jit
def _places(hidden, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """This program's row, its blocks of it, and the elements of these: where they lie, and whether they exist."""
    n = tl.program_id(0).to(tl.int64)
    b_B1 = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[:, None]
    i_1W = tl.arange(0, WIDTH)[None, :]
    at = b_B1 * BLOCK + i_1W
    inside = (i_1W < BLOCK) & (at < hidden)
    return n, b_B1, at, inside


@triton.jit
def _encode_kernel(
    x_NH, value_NH, scale_NB, hidden, blocks, stride_x, stride_value, stride_scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    n, b_B1, at, inside = _places(hidden, BLOCK, WIDTH, BLOCKS)
    x = tl.load(x_NH + n * stride_x + at, mask=inside, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(x), axis=1, keep_dims=True)
    scale = tl.exp2(tl.ceil(tl.log2(tl.where(peak > 0, peak, 448.0) / 448.0)))
    tl.store(value_NH + n * stride_value + at, _rounded(x / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scale_NB + n * stride_scale + b_B1, scale, mask=b_B1 < blocks)


@triton.jit
def _decode_kernel(
    value_NH, scale_NB, out_NH, hidden, blocks, stride_value, stride_scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    n, b_B1, at, inside = _places(hidden, BLOCK, WIDTH, BLOCKS)
    value = tl.load(value_NH + n * stride_value + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_NB + n * stride_scale + b_B1, mask=b_B1 < blocks, other=0.0)
    tl.store(out_NH + n * hidden + at, (value * scale).to(out_NH.dtype.element_ty), mask=inside)


@on_its_device
def encode(x_NH: Tensor, block: int) -> Tensor:
    """Bytes [N, H + 4 · ceil(H / block)] of floating x [N, H], float32 or narrower."""
    rows, hidden = x_NH.shape
    blocks = triton.cdiv(hidden, block)
    x_NH = x_NH if x_NH.stride(1) == 1 else x_NH.contiguous()
    out = x_NH.new_empty(rows, hidden + 4 * blocks, dtype=torch.uint8)
    value, scale = _parts(out, hidden, blocks)
    if out.numel():
        _encode_kernel[rows, triton.cdiv(blocks, BLOCKS)](
            x_NH, value, scale, hidden, blocks, x_NH.stride(0), value.stride(0), scale.stride(0),
            BLOCK=block, WIDTH=triton.next_power_of_2(block), BLOCKS=BLOCKS,
        )  # fmt: skip
    if scale.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        out[:, hidden:] = scale.view(torch.uint8)
    return out


@on_its_device
def decode(arrived: Tensor, hidden: int, block: int, dtype: torch.dtype) -> Tensor:
    """Rows [N, `hidden`] in `dtype` of what `encode` wrote."""
    blocks = triton.cdiv(hidden, block)
    arrived = arrived.contiguous()
    value, scale = _parts(arrived, hidden, blocks)
    if scale.untyped_storage().data_ptr() != arrived.untyped_storage().data_ptr():
        scale.view(torch.uint8).copy_(arrived[:, hidden:])
    out = arrived.new_empty(len(arrived), hidden, dtype=dtype)
    if out.numel():
        _decode_kernel[len(out), triton.cdiv(blocks, BLOCKS)](
            value, scale, out, hidden, blocks, value.stride(0), scale.stride(0),
            BLOCK=block, WIDTH=triton.next_power_of_2(block), BLOCKS=BLOCKS,
        )  # fmt: skip
    return out


def _parts(rows: Tensor, hidden: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Values and scales of rows of bytes; scales that lie at no whole number of them get memory of their own."""
    value = rows[:, :hidden].view(torch.float8_e4m3fn)
    if hidden % 4 == 0 and len(rows) > 1:
        return value, rows[:, hidden:].view(torch.float32)
    return value, rows.new_empty(len(rows), blocks, dtype=torch.float32)
