"""`expert_ffn` for few rows on CPU: torch's grouped products, all rows at once.

If all rows of a layer fit into the cache, a loop over experts in Python costs more than it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import activation
from moesys.kernels.choose import has_aligned_rows
from moesys.kernels.expert_ffn_arguments import Arguments
from moesys.kernels.grouped_matmul import torch_grouped_mm

_product = torch_grouped_mm


def fits(args: Arguments, most: int) -> bool:
    """Whether torch's grouped products take `args`, and its inner activations have at most `most` elements.

    They need float32 and rows whose size is a multiple of 16 bytes, in memory too.
    """
    hidden, _, inner = args.fc1.shape[1:]
    if args.x_TH.dtype != torch.float32 or not 0 < args.rows * inner <= most or hidden % 4 or inner % 4:
        return False
    return args.fc1.is_contiguous() and has_aligned_rows(args.x_TH) and has_aligned_rows(args.fc2)


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Output and h [N, G, F] of the operation `moesys::expert_ffn`."""
    fc1, counts_E = args.fc1, args.counts_E
    ends = counts_E.cumsum(0, dtype=torch.int32)
    h = _product(_rows(args.x_TH, args), fc1.flatten(2), offs=ends).view(-1, *fc1.shape[2:])
    if args.bias1 is not None:
        h += args.bias1.repeat_interleave(counts_E, 0)
    y = _product(activation.forward(h, args.kind, args.weight_N), args.fc2, offs=ends)
    return _sums(y, args), h


def backward(grad_TH: Tensor, args: Arguments, h_NGF: Tensor, of_fc1: bool, of_fc2: bool) -> tuple[Tensor | None, ...]:
    """Gradients of `moesys::expert_ffn_backward`, None in place of empty ones.

    Routing weights have no zeros, `grad_TH` is contiguous.
    """
    fc1, counts_E, weight_N = args.fc1, args.counts_E, args.weight_N
    ends = counts_E.cumsum(0, dtype=torch.int32)
    dy = _rows(grad_TH, args)
    if weight_N is not None:
        # Gathered rows are this function's own.
        dy = torch.mul(dy, weight_N.to(dy.dtype).unsqueeze(-1), out=None if args.index_N is None else dy)
    dh = torch.empty_like(h_NGF)
    recomputed = activation.Recomputed(h_NGF, args.kind, dh)
    grad2 = _product(recomputed.inner.t(), dy, offs=ends) if of_fc2 else None
    along = recomputed.backward(_product(dy, args.fc2.mT, offs=ends))
    del dy, recomputed
    dh_NM = dh.flatten(1)
    grad1 = _product(_rows(args.x_TH, args).t(), dh_NM, offs=ends).view_as(fc1) if of_fc1 else None
    grad_x = _sums(_product(dh_NM, fc1.flatten(2).mT, offs=ends), args)
    grad_bias = None
    if args.bias1 is not None:
        expert_N = torch.arange(len(counts_E)).repeat_interleave(counts_E)
        grad_bias = args.bias1.new_zeros(args.bias1.shape).index_add_(0, expert_N, dh)
    return grad_x, grad1, grad2, None if weight_N is None else along / weight_N, grad_bias


def _rows(x_TH: Tensor, args: Arguments) -> Tensor:
    return x_TH if args.index_N is None else x_TH.index_select(0, args.index_N)


def _sums(rows_NH: Tensor, args: Arguments) -> Tensor:
    """Each token's sum of rows; the rows themselves where there are no tokens."""
    if args.index_N is None:
        return rows_NH
    return rows_NH.new_zeros(args.x_TH.shape).index_add_(0, args.index_N, rows_NH)
