"""Gathering rows by expert and summing them back by token: encode and decode of the MoE layer.

T tokens, A assignments, H hidden. Both directions use the same two operations, each the other's backward: `gather`
copies rows, `gather_sum` sums a run of rows per token. Neither scatters, so sums are deterministic and run in parallel
over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.kernels.choose import choose


@dataclass(frozen=True)
class Permutation:
    """The order of assignments whose rows are sorted by expert; all int64.

    token_A: source token of each sorted row. row_A: sorted row of each assignment, assignments in
    the order of their tokens. offsets_T1 [T + 1]: token t's assignments are row_A[offsets[t] : offsets[t+1]].
    order_A: the assignment in each sorted row. counts_E: rows of each expert.
    """

    token_A: Tensor
    row_A: Tensor
    offsets_T1: Tensor
    order_A: Tensor
    counts_E: Tensor


def sort_by_expert(token_A: Tensor, expert_A: Tensor, tokens: int, experts: int) -> Permutation:
    """Stable sort of assignments by expert; `token_A` int64 ascending. Nothing waits for the device."""
    sorted_expert, order = expert_A.sort(stable=True)
    number = torch.arange(max(len(order), tokens + 1, experts + 1), device=token_A.device)
    row_A = torch.empty_like(order).scatter_(0, order, number[: len(order)])
    offsets_T1 = torch.searchsorted(token_A, number[: tokens + 1])
    ends_E1 = torch.searchsorted(sorted_expert, number[: experts + 1])
    return Permutation(token_A.index_select(0, order), row_A, offsets_T1, order, ends_E1.diff())


def reference(x_TH: Tensor, p: Permutation) -> Tensor:
    """`permute` by its definition: rows [A, H] of x [T, H] sorted by expert."""
    return x_TH[p.token_A]


def reference_unpermute(rows_AH: Tensor, p: Permutation, weight_A: Tensor | None = None) -> Tensor:
    """`unpermute` by its definition."""
    if weight_A is not None:
        rows_AH = rows_AH * weight_A.to(rows_AH.dtype).unsqueeze(-1)
    return rows_AH.new_zeros(len(p.offsets_T1) - 1, rows_AH.shape[1]).index_add(0, p.token_A, rows_AH)


def permute(x_TH: Tensor, p: Permutation) -> Tensor:
    """Rows [A, H] of x [T, H] sorted by expert, in the type of x."""
    if choose(x_TH, "permute") == "reference":
        return reference(x_TH, p)
    return _Permute.apply(x_TH, p)


def unpermute(rows_AH: Tensor, p: Permutation, weight_A: Tensor | None = None) -> Tensor:
    """[T, H]: each token's sum of weight · row over its rows [A, H]; without rows, zeros.

    `weight_A` float32 [A], in the order of the sorted rows; None: all 1. Sums in float32 or wider.
    """
    if choose(rows_AH, "unpermute") == "reference":
        return reference_unpermute(rows_AH, p, weight_A)
    return _Unpermute.apply(rows_AH, weight_A, p)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, p):  # type: ignore[override]
        ctx.p = p
        return gather(x_TH, p.token_A)

    @staticmethod
    def backward(ctx, grad_AH):  # type: ignore[override]
        return gather_sum(grad_AH.contiguous(), ctx.p.row_A, ctx.p.offsets_T1, None), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_AH, weight_A, p):  # type: ignore[override]
        ctx.p, ctx.weighted = p, weight_A is not None
        ctx.save_for_backward(*((rows_AH, weight_A) if ctx.weighted else ()))
        ordered = None if weight_A is None else weight_A.index_select(0, p.row_A)
        return gather_sum(rows_AH.contiguous(), p.row_A, p.offsets_T1, ordered)

    @staticmethod
    def backward(ctx, grad_TH):  # type: ignore[override]
        if not ctx.weighted:
            return gather(grad_TH.contiguous(), ctx.p.token_A), None, None
        rows_AH, weight_A = ctx.saved_tensors
        if choose(rows_AH, "unpermute") == "triton":
            from moesys.kernels.triton import permute as kernel

            grad_weight = kernel.weight_grad(grad_TH, rows_AH, None, ctx.p.token_A).to(weight_A.dtype)
            return kernel.gather(grad_TH, ctx.p.token_A, weight_A), grad_weight, None
        grad_AH = gather(grad_TH.contiguous(), ctx.p.token_A)
        grad_weight = torch.linalg.vecdot(grad_AH, rows_AH).to(weight_A.dtype)
        return grad_AH.mul_(weight_A.to(grad_AH.dtype).unsqueeze(-1)), grad_weight, None


def gather(x_TH: Tensor, index_A: Tensor) -> Tensor:
    """out[a] = x[index[a]], without autograd."""
    if choose(x_TH, "permute") == "triton":
        from moesys.kernels.triton import permute as kernel

        return kernel.gather(x_TH, index_A)
    return x_TH.index_select(0, index_A)


def gather_sum(rows_AH: Tensor, index_A: Tensor, offsets_T1: Tensor, weight_A: Tensor | None) -> Tensor:
    """out[t] = Σ over a in offsets[t] : offsets[t+1] of weight[a] · rows[index[a]], without autograd."""
    if choose(rows_AH, "unpermute") == "triton":
        from moesys.kernels.triton import permute as kernel

        return kernel.gather_sum(rows_AH, index_A, offsets_T1, weight_A)
    weight = None if weight_A is None else weight_A.to(rows_AH.dtype)
    bag = torch.embedding_bag(rows_AH, index_A, offsets_T1, False, 0, False, weight, True)
    return bag[0]
