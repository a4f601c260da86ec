"""Quantised tensors of released files, and the float32 numbers that they stand for.

- FP8 in blocks (DeepSeek-V3, Kimi-K2, MiniMax-M2, Qwen3-FP8): X.weight in 8 bits, and X.weight_scale_inv with one
  factor per block of rows and columns. Despite its name it multiplies. The size of a block follows from both shapes.
- MXFP4 (GPT-OSS): X_blocks [E, R, C / 32, 16] with two 4-bit numbers a byte, the low half first, and X_scales
  [E, R, C / 32], exponents of two. X is [E, C, R], transposed, as the same family's bfloat16 files have it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS = 127
"""Of the exponents of MXFP4, and of factors that are exponents."""


def block_sizes(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """Elements that one factor is for, per dim: powers of two, by which both shapes fit."""
    found = []
    for size, count in zip(shape, scales, strict=True):
        block = 1
        while -(-size // block) > count:
            block *= 2
        found.append(block if -(-size // block) == count else -(-size // count))
    return tuple(found)


def factors(scale: Tensor) -> Tensor:
    """Factors of any shape [..., blocks] as float32: exponents of two are bytes, or of torch's type for them."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - BIAS)
    return scale.float()


def dequantised(weight: Tensor, scale: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """float32 [R, C] of FP8 numbers `weight` [R, C] and their factors `scale`, one per block.

    `places`: for each dim, int64 [R] or [C], the place among the factors of the block of each index.
    """
    each = factors(scale)
    for dim, place in enumerate(places):
        each = each.index_select(dim, place)
    return weight.float() * each


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., 32·G] of blocks uint8 [..., G, 16] and scales uint8 [..., G] (OCP microscaling formats)."""
    values = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)])
    low, high = values[(blocks & 0x0F).long()], values[(blocks >> 4).long()]
    both = torch.stack([low, high], -1).flatten(-2)
    return (both * torch.exp2(scales.float() - BIAS).unsqueeze(-1)).flatten(-2)
