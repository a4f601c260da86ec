"""How rows are written while they travel to experts: in eight bits, with a scale for every block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
LARGEST = 448.0
"""Of float8_e4m3fn."""


class Fp8Rows:
    """Rows [N, H] as bytes [N, H + 4 · ceil(H/128)]: float8_e4m3fn, then a float32 scale per 128 elements.

    As DeepSeek-V3 dispatches (arXiv 2412.19437), with scales that are powers of two: a value that was
    written once is written again, on the next level of a hierarchy, without a further error. The error of
    an element is at most 2⁻⁴ of it (4 significant bits), or 2⁻¹⁰ times its block's scale where that is
    more. Bytes, since backends of `torch.distributed` lack the type. Gradients travel in their own type.
    """

    def __init__(self, hidden: int, dtype: torch.dtype):
        self.hidden, self.dtype = hidden, dtype
        self.block = min(BLOCK, hidden)

    def encode(self, x_NH: Tensor) -> Tensor:
        blocks = pad(x_NH.float(), (0, -self.hidden % self.block)).unflatten(1, (-1, self.block))
        peak = blocks.abs().amax(-1, keepdim=True)
        scale = (peak / LARGEST).log2().ceil().exp2().where(peak > 0, 1.0)
        values = (blocks / scale).flatten(1)[:, : self.hidden].to(torch.float8_e4m3fn)
        return torch.cat((values.view(torch.uint8), dense(scale.squeeze(-1)).view(torch.uint8)), 1)

    def decode(self, arrived: Tensor) -> Tensor:
        values = dense(arrived[:, : self.hidden]).view(torch.float8_e4m3fn).float()
        scale = dense(arrived[:, self.hidden :]).view(torch.float32)
        return (values * scale.repeat_interleave(self.block, 1)[:, : self.hidden]).to(self.dtype)


def dense(x: Tensor) -> Tensor:
    """x with its elements side by side, so that their bytes can be read as another type.

    `contiguous` leaves the strides of a single row, or of none, as they are.
    """
    return x.clone(memory_format=torch.contiguous_format)
