"""`expert_ffn` for few rows on CPU: torch's grouped products, all rows at once.

Where a layer's rows fit into the cache together, looping over experts in Python costs more than it spares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import activation
from moesys.kernels.choose import has_aligned_rows

_product = torch._grouped_mm


def fits(x_TH: Tensor, fc1: Tensor, fc2: Tensor, rows: int, most: int) -> bool:
    """Whether torch's grouped products take it, and its inner activations have at most `most` elements.

    They need float32 and rows whose size is a multiple of 16 bytes, in memory too.
    """
    hidden, _, inner = fc1.shape[1:]
    if x_TH.dtype != torch.float32 or not 0 < rows * inner <= most or hidden % 4 or inner % 4:
        return False
    return fc1.is_contiguous() and has_aligned_rows(x_TH) and has_aligned_rows(fc2)


def forward(
    x_TH: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    counts_E: Tensor,
    weight_N: Tensor | None,
    bias1: Tensor | None,
    index_N: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """As the operation `moesys::expert_ffn`: (output, h [N, G, F])."""
    ends = counts_E.cumsum(0).to(torch.int32)
    rows = x_TH if index_N is None else x_TH.index_select(0, index_N)
    h = _product(rows, fc1.flatten(2), offs=ends).unflatten(1, fc1.shape[2:])
    if bias1 is not None:
        h += bias1.repeat_interleave(counts_E, 0)
    y = _product(activation.forward(h, kind, weight_N), fc2, offs=ends)
    return (y if index_N is None else x_TH.new_zeros(x_TH.shape).index_add_(0, index_N, y)), h


def backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    counts_E: Tensor,
    weight_N: Tensor | None,
    bias1: Tensor | None,
    index_N: Tensor | None,
    h_NGF: Tensor,
    kind: str,
    of_fc1: bool,
    of_fc2: bool,
) -> tuple[Tensor | None, ...]:
    """As `moesys::expert_ffn_backward`, None for empty; `weight_N` without zeros, the gradient contiguous."""
    ends = counts_E.cumsum(0).to(torch.int32)
    x, dy = (t if index_N is None else t.index_select(0, index_N) for t in (x_TH, grad_TH))
    if weight_N is not None:
        dy = dy * weight_N.to(dy.dtype).unsqueeze(-1)
    dh = torch.empty_like(h_NGF)
    again = activation.Again(h_NGF, kind, dh)
    grad2 = _product(again.inner.t(), dy, offs=ends) if of_fc2 else None
    again.inner.copy_(_product(dy, fc2.mT, offs=ends))
    along = again.backward()
    grad1 = _product(x.t(), dh.flatten(1), offs=ends).view_as(fc1) if of_fc1 else None
    dx = _product(dh.flatten(1), fc1.flatten(2).mT, offs=ends)
    grad_x = dx if index_N is None else x_TH.new_zeros(x_TH.shape).index_add_(0, index_N, dx)
    grad_bias = None
    if bias1 is not None:
        expert_N = torch.arange(len(counts_E)).repeat_interleave(counts_E)
        grad_bias = bias1.new_zeros(bias1.shape).index_add_(0, expert_N, dh)
    return grad_x, grad1, grad2, None if weight_N is None else along / weight_N, grad_bias
