"""The encoding of rows that are sent to experts in eight bits, with a scale for every block."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels.choose import choose

BLOCK = 128
LARGEST = 448.0
"""The largest number of float8_e4m3fn."""


class Fp8Rows:
    """Rows [N, H] as bytes [N, H + 4 · ceil(H/128)]: float8_e4m3fn, then a float32 scale per 128 elements.

    As DeepSeek-V3 dispatches (arXiv 2412.19437), with scales that are powers of two: encoding a row again, on the next
    level of a hierarchy, adds no error. The error of an element is at most 2⁻⁴ of it (4 significant bits), or 2⁻¹⁰
    times its block's scale where that is more. Rows are sent as bytes, since backends of `torch.distributed` lack the
    type. Gradients are sent in their own type.
    """

    def __init__(self, hidden: int, dtype: torch.dtype):
        self.hidden, self.dtype = hidden, dtype
        self.block = min(BLOCK, hidden)

    def encode(self, x_NH: Tensor) -> Tensor:
        """The bytes of rows [N, H]."""
        if self._in_one_kernel(x_NH):
            from moesys.kernels.triton import fp8_rows as kernel

            return kernel.encode(x_NH, self.block)
        out = x_NH.new_empty(len(x_NH), self.hidden + 4 * -(-self.hidden // self.block), dtype=torch.uint8)
        scales = [_write(x, out[:, part]) for part, x in self._parts(x_NH)]
        scale = scales[0] if len(scales) == 1 else torch.cat(scales, 1)
        out[:, self.hidden :] = dense(scale).view(torch.uint8)
        return out

    def decode(self, received: Tensor) -> Tensor:
        """The rows [N, H] of the bytes that were received, in `dtype`."""
        if self._in_one_kernel(received):
            from moesys.kernels.triton import fp8_rows as kernel

            return kernel.decode(received, self.hidden, self.block, self.dtype)
        out = _read(received[:, : self.hidden])
        scale = dense(received[:, self.hidden :]).view(torch.float32)
        scales = scale.split([self.hidden // self.block, scale.shape[1] - self.hidden // self.block], 1)
        for (_, values), of_part in zip(self._parts(out), scales, strict=False):
            values.mul_(of_part.unsqueeze(-1))
        return out.to(self.dtype)

    def _in_one_kernel(self, x: Tensor) -> bool:
        """Whether Triton writes and reads the rows; on GPUs it can from compute capability 8.9 on."""
        if choose(x, "fp8_rows") != "triton" or self.dtype == torch.float64:
            return False
        return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9)

    def _parts(self, x_NH: Tensor) -> list[tuple[slice, Tensor]]:
        """Columns and a view [N, blocks, size] of the whole blocks of rows [N, H], then of the shorter last one."""
        whole = self.hidden // self.block * self.block
        parts = [(slice(0, whole), x_NH[:, :whole].unflatten(1, (-1, self.block)))]
        return parts if whole == self.hidden else [*parts, (slice(whole, self.hidden), x_NH[:, None, whole:])]


def _write(x_NBb: Tensor, out_NH: Tensor) -> Tensor:
    """Write blocks x [N, B, b] to the bytes `out` [N, B · b]; returns their scales float32 [N, B]."""
    peak = x_NBb.abs().amax(-1).float()
    scale = (peak / LARGEST).log2().ceil().exp2().where(peak > 0, 1.0)
    # A division by numbers of another type would be several times slower.
    wide = x_NBb.float()
    divided = (torch.div if wide is x_NBb else Tensor.div_)(wide, scale.unsqueeze(-1))
    out_NH.view(torch.float8_e4m3fn).copy_(divided.flatten(1))
    return scale


def _read(bytes_NH: Tensor) -> Tensor:
    """The numbers of eight bits as float32; on CPU by a table, in a third of a conversion's time."""
    if bytes_NH.is_cuda:
        return bytes_NH.view(torch.float8_e4m3fn).float()
    known = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return known.index_select(0, bytes_NH.int().flatten()).view(bytes_NH.shape)


def dense(x: Tensor) -> Tensor:
    """A copy of x whose elements lie side by side, so that their bytes can be viewed as another type.

    x [N, …], rows.

    `contiguous` would leave the strides of a single row, or of none, as they are.
    """
    return x.clone(memory_format=torch.contiguous_format)
