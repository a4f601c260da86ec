"""Copying rows, and summing runs of rows: what the MoE layer's permutation is made of.

T tokens, A assignments, H hidden. Nothing scatters and nothing is added atomically: each output has one
program, which adds in a fixed order. After ScatterMoE (arXiv 2403.08245), which gathers likewise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesys.kernels.triton.launch import on_its_device

ELEMENTS = 2048
"""Elements that a program loads at once."""

BAG = 4
"""Rows of a run that are loaded at once."""


@triton.jit
def _gather_kernel(
    x, index_A, weight_A, out, rows, hidden, x_stride,
    WEIGHTED: tl.constexpr, WIDE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    a_B1 = (tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A))[:, None]
    h_1H = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    row = a_B1 < rows
    inside = row & (h_1H < hidden)
    source_B1 = tl.load(index_A + a_B1, mask=row, other=0).to(tl.int64)
    value = tl.load(x + source_B1 * x_stride + h_1H, mask=inside)
    if WEIGHTED:
        value = value.to(WIDE) * tl.load(weight_A + a_B1, mask=row, other=0.0).to(WIDE)
    tl.store(out + a_B1 * hidden + h_1H, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gather_sum_kernel(
    rows_AH, index_A, offsets_T1, weight_A, out_TH, hidden, row_stride,
    WEIGHTED: tl.constexpr, WIDE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    start, end = tl.load(offsets_T1 + t), tl.load(offsets_T1 + t + 1)
    total_H = tl.zeros((BLOCK_H,), WIDE)
    for first in range(start, end, BLOCK_A):
        a_B = first + tl.arange(0, BLOCK_A)
        row_B = tl.load(index_A + a_B, mask=a_B < end, other=0).to(tl.int64)
        inside = (a_B < end)[:, None] & (h_H < hidden)[None, :]
        value = tl.load(rows_AH + row_B[:, None] * row_stride + h_H[None, :], mask=inside, other=0.0).to(WIDE)
        if WEIGHTED:
            value *= tl.load(weight_A + a_B, mask=a_B < end, other=0.0).to(WIDE)[:, None]
        total_H += tl.sum(value, axis=0)
    tl.store(out_TH + t * hidden + h_H, total_H.to(out_TH.dtype.element_ty), mask=h_H < hidden)


@triton.jit
def _dot_kernel(
    grad_TH, rows_AH, index_A, token_A, out_A, rows, hidden, grad_stride, row_stride,
    INDEXED: tl.constexpr, WIDE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    a_B = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    token_B1 = tl.load(token_A + a_B, mask=a_B < rows, other=0).to(tl.int64)[:, None]
    row_B1 = a_B[:, None]
    if INDEXED:
        row_B1 = tl.load(index_A + a_B, mask=a_B < rows, other=0).to(tl.int64)[:, None]
    total_BH = tl.zeros((BLOCK_A, BLOCK_H), WIDE)
    for first in range(0, hidden, BLOCK_H):
        h_1H = (first + tl.arange(0, BLOCK_H))[None, :]
        inside = (a_B < rows)[:, None] & (h_1H < hidden)
        grad = tl.load(grad_TH + token_B1 * grad_stride + h_1H, mask=inside, other=0.0)
        value = tl.load(rows_AH + row_B1 * row_stride + h_1H, mask=inside, other=0.0)
        total_BH += grad.to(WIDE) * value.to(WIDE)
    tl.store(out_A + a_B, tl.sum(total_BH, axis=1), mask=a_B < rows)


@torch.library.custom_op("moesys::gather", mutates_args=())
@on_its_device
def gather(x_TH: Tensor, index_A: Tensor, weight_A: Tensor | None = None) -> Tensor:
    """out[a] = weight[a] · x[index[a]]: [A, H] in the type of x, contiguous.

    Args:
        x_TH: floating [T, H].
        index_A: integer [A], each in [0, T), any number of times.
        weight_A: floating [A], or None for 1; the product is formed in float32 or wider.
    """
    x_TH, index_A = _rows(x_TH), index_A.contiguous()
    rows, hidden = len(index_A), x_TH.shape[1]
    out = x_TH.new_empty(rows, hidden)
    if out.numel():
        block_a, block_h = _blocks(hidden)
        _gather_kernel[(triton.cdiv(rows, block_a), triton.cdiv(hidden, block_h))](
            x_TH, index_A, _flat(weight_A), out, rows, hidden, x_TH.stride(0),
            weight_A is not None, wide(x_TH), block_a, block_h,
        )  # fmt: skip
    return out


@torch.library.custom_op("moesys::gather_sum", mutates_args=())
@on_its_device
def gather_sum(rows_AH: Tensor, index_A: Tensor, offsets_T1: Tensor, weight_A: Tensor | None = None) -> Tensor:
    """out[t] = Σ over a in offsets[t] : offsets[t + 1] of weight[a] · rows[index[a]]: [T, H].

    Summed in float32 (or wider), always in the same order; an empty run gives zeros.

    Args:
        rows_AH: floating [any, H]; the output is of its type.
        index_A: integer [A], each a row of `rows_AH`.
        offsets_T1: integer [T + 1], ascending, within [0, A].
        weight_A: floating [A], or None for 1.
    """
    rows_AH = _rows(rows_AH)
    tokens, hidden = len(offsets_T1) - 1, rows_AH.shape[1]
    out = rows_AH.new_empty(tokens, hidden)
    if out.numel():
        block_h = min(ELEMENTS // 2, triton.next_power_of_2(hidden))
        _gather_sum_kernel[(tokens, triton.cdiv(hidden, block_h))](
            rows_AH, index_A.contiguous(), offsets_T1.contiguous(), _flat(weight_A), out, hidden, rows_AH.stride(0),
            weight_A is not None, wide(rows_AH), BAG, block_h,
        )  # fmt: skip
    return out


@torch.library.custom_op("moesys::weight_grad", mutates_args=())
@on_its_device
def weight_grad(grad_TH: Tensor, rows_AH: Tensor, index_A: Tensor | None, token_A: Tensor) -> Tensor:
    """out[a] = grad[token[a]] · rows[index[a]], the gradient of the weights: [A], float32 or wider.

    Args:
        grad_TH: floating [T, H].
        rows_AH: floating [any, H].
        index_A: integer [A], each a row of `rows_AH`; None for a itself.
        token_A: integer [A], each in [0, T).
    """
    grad_TH, rows_AH = _rows(grad_TH), _rows(rows_AH)
    rows, hidden = len(token_A), rows_AH.shape[1]
    out = torch.empty(rows, dtype=torch.promote_types(rows_AH.dtype, torch.float32), device=rows_AH.device)
    if rows:
        block_a, block_h = _blocks(hidden)
        _dot_kernel[(triton.cdiv(rows, block_a),)](
            grad_TH, rows_AH, _flat(index_A), token_A.contiguous(), out, rows, hidden,
            grad_TH.stride(0), rows_AH.stride(0), index_A is not None, wide(rows_AH), block_a, block_h,
        )  # fmt: skip
    return out


@gather.register_fake
def _(x_TH, index_A, weight_A=None):
    return x_TH.new_empty(index_A.shape[0], x_TH.shape[1])


@gather_sum.register_fake
def _(rows_AH, index_A, offsets_T1, weight_A=None):
    return rows_AH.new_empty(offsets_T1.shape[0] - 1, rows_AH.shape[1])


@weight_grad.register_fake
def _(grad_TH, rows_AH, index_A, token_A):
    return rows_AH.new_empty(token_A.shape[0], dtype=torch.promote_types(rows_AH.dtype, torch.float32))


def wide(x: Tensor) -> tl.dtype:
    """The type to compute in. x may have any shape."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _blocks(hidden: int) -> tuple[int, int]:
    """(rows, columns) of a program."""
    block_h = min(ELEMENTS, triton.next_power_of_2(hidden))
    return ELEMENTS // block_h, block_h
