"""`expert_ffn` for few rows on CPU: torch's grouped products, all rows at once.

Where a layer's rows fit into the cache together, looping over experts in Python costs more than it spares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import activation
from moesys.kernels.choose import has_aligned_rows
from moesys.kernels.expert_ffn_given import Given
from moesys.kernels.grouped_matmul import torch_grouped_mm

_product = torch_grouped_mm


def fits(given: Given, most: int) -> bool:
    """Whether torch's grouped products take it, and its inner activations have at most `most` elements.

    They need float32 and rows whose size is a multiple of 16 bytes, in memory too.
    """
    hidden, _, inner = given.fc1.shape[1:]
    if given.x_TH.dtype != torch.float32 or not 0 < given.rows * inner <= most or hidden % 4 or inner % 4:
        return False
    return given.fc1.is_contiguous() and has_aligned_rows(given.x_TH) and has_aligned_rows(given.fc2)


def forward(given: Given) -> tuple[Tensor, Tensor]:
    """As the operation `moesys::expert_ffn`: (output, h [N, G, F])."""
    fc1, counts_E = given.fc1, given.counts_E
    ends = counts_E.cumsum(0).to(torch.int32)
    h = _product(_rows(given.x_TH, given), fc1.flatten(2), offs=ends).unflatten(1, fc1.shape[2:])
    if given.bias1 is not None:
        h += given.bias1.repeat_interleave(counts_E, 0)
    y = _product(activation.forward(h, given.kind, given.weight_N), given.fc2, offs=ends)
    return _sums(y, given), h


def backward(grad_TH: Tensor, given: Given, h_NGF: Tensor, of_fc1: bool, of_fc2: bool) -> tuple[Tensor | None, ...]:
    """As `moesys::expert_ffn_backward`, None for empty; routing weights without zeros, the gradient contiguous."""
    fc1, counts_E, weight_N = given.fc1, given.counts_E, given.weight_N
    ends = counts_E.cumsum(0).to(torch.int32)
    x, dy = _rows(given.x_TH, given), _rows(grad_TH, given)
    if weight_N is not None:
        dy = dy * weight_N.to(dy.dtype).unsqueeze(-1)
    dh = torch.empty_like(h_NGF)
    again = activation.Again(h_NGF, given.kind, dh)
    grad2 = _product(again.inner.t(), dy, offs=ends) if of_fc2 else None
    again.inner.copy_(_product(dy, given.fc2.mT, offs=ends))
    along = again.backward()
    grad1 = _product(x.t(), dh.flatten(1), offs=ends).view_as(fc1) if of_fc1 else None
    grad_x = _sums(_product(dh.flatten(1), fc1.flatten(2).mT, offs=ends), given)
    grad_bias = None
    if given.bias1 is not None:
        expert_N = torch.arange(len(counts_E)).repeat_interleave(counts_E)
        grad_bias = given.bias1.new_zeros(given.bias1.shape).index_add_(0, expert_N, dh)
    return grad_x, grad1, grad2, None if weight_N is None else along / weight_N, grad_bias


def _rows(x_TH: Tensor, given: Given) -> Tensor:
    return x_TH if given.index_N is None else x_TH.index_select(0, given.index_N)


def _sums(rows_NH: Tensor, given: Given) -> Tensor:
    """Each token's sum of rows; the rows themselves where there are no tokens."""
    if given.index_N is None:
        return rows_NH
    return rows_NH.new_zeros(given.x_TH.shape).index_add_(0, given.index_N, rows_NH)
