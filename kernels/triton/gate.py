"""The gate as one kernel: scores, k rounds of picking the best expert, weights, histogram.

T tokens, E experts, k choices per token. A program holds a few tokens with all their experts in
registers, so logits are read once. Operations of torch's own registry: so that torch.compile and fake
tensors take them as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesys.kernels.triton.launch import on_its_device

ELEMENTS, TOKENS = 2048, 32
"""Most tokens x experts that a program holds, to fit registers, and most tokens, to fill the device."""


@triton.jit
def _forward_kernel(
    logits_TE, weight_Tk, expert_Tk, probabilities_TE, load_E, tokens, experts,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, SCALE: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t_B1 = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    e_1E = tl.arange(0, BLOCK_E)[None, :]
    k_1K = tl.arange(0, BLOCK_K)[None, :]
    inside = (t_B1 < tokens) & (e_1E < experts)
    x = tl.load(logits_TE + t_B1 * experts + e_1E, mask=inside, other=float("-inf"))
    if SIGMOID:
        score = 1 / (1 + tl.exp(-x))
    else:
        # A padding token is all -inf; subtracting 0 from it spares a NaN.
        peak = tl.max(x, axis=1, keep_dims=True)
        p = tl.exp(x - tl.where(t_B1 < tokens, peak, 0))
        total = tl.sum(p, axis=1, keep_dims=True)
        score = p / tl.where(t_B1 < tokens, total, 1)
    tl.store(probabilities_TE + t_B1 * experts + e_1E, score, mask=inside)

    key = tl.where(x == x, x, float("inf"))  # NaN is largest, as torch sorts
    free = (e_1E < experts) & (t_B1 >= 0)
    weight_BK = tl.zeros((BLOCK_T, BLOCK_K), x.dtype)
    expert_BK = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.where(free, key, float("-inf")), axis=1, keep_dims=True)
        # The lowest of the free experts that have the best logit: of -inf and NaN, too, one that exists.
        pick = tl.min(tl.where(free & (key == best), e_1E, BLOCK_E), axis=1, keep_dims=True)
        here = e_1E == pick
        free = free & (e_1E != pick)
        chosen = tl.sum(tl.where(here, score, 0), axis=1, keep_dims=True)
        weight_BK = tl.where(k_1K == k, chosen, weight_BK)
        expert_BK = tl.where(k_1K == k, pick, expert_BK)
    if NORMALIZE:
        total = tl.sum(weight_BK, axis=1, keep_dims=True) + EPSILON
        weight_BK = weight_BK / tl.where(t_B1 < tokens, total, 1)
    stored = (t_B1 < tokens) & (k_1K < TOP_K)
    tl.store(weight_Tk + t_B1 * TOP_K + k_1K, weight_BK * SCALE, mask=stored)
    tl.store(expert_Tk + t_B1 * TOP_K + k_1K, expert_BK.to(tl.int64), mask=stored)
    # Integers, so the order of the additions does not matter.
    taken = tl.sum((inside & (free == 0)).to(tl.int32), axis=0)
    e_E = tl.arange(0, BLOCK_E)
    tl.atomic_add(load_E + e_E, taken.to(tl.int64), mask=(e_E < experts) & (taken > 0), sem="relaxed")


@triton.jit
def _backward_kernel(
    grad_weight_Tk, grad_probabilities_TE, probabilities_TE, expert_Tk, grad_logits_TE, tokens, experts,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, SCALE: tl.constexpr, EPSILON: tl.constexpr,
    OF_WEIGHT: tl.constexpr, OF_PROBABILITIES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    t_B1 = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    e_1E = tl.arange(0, BLOCK_E)[None, :]
    row = t_B1 < tokens
    inside = row & (e_1E < experts)
    score = tl.load(probabilities_TE + t_B1 * experts + e_1E, mask=inside, other=0.0)
    grad = tl.zeros((BLOCK_T, BLOCK_E), score.dtype)
    if OF_WEIGHT:
        chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int1)
        for k in tl.static_range(TOP_K):
            here = e_1E == tl.load(expert_Tk + t_B1 * TOP_K + k, mask=row, other=-1)
            upstream = tl.load(grad_weight_Tk + t_B1 * TOP_K + k, mask=row, other=0.0)
            grad = tl.where(here, upstream * SCALE, grad)
            chosen = chosen | here
        if NORMALIZE:
            total = tl.sum(tl.where(chosen, score, 0), axis=1, keep_dims=True) + EPSILON
            total = tl.where(row, total, 1)
            mean = tl.sum(grad * (score / total), axis=1, keep_dims=True)
            grad = tl.where(chosen, (grad - mean) / total, 0)
    if OF_PROBABILITIES:
        grad += tl.load(grad_probabilities_TE + t_B1 * experts + e_1E, mask=inside, other=0.0)
    if SIGMOID:
        grad *= 1 - score
    else:
        grad -= tl.sum(grad * score, axis=1, keep_dims=True)
    tl.store(grad_logits_TE + t_B1 * experts + e_1E, score * grad, mask=inside)


@torch.library.custom_op("moesys::gate", mutates_args=())
@on_its_device
def forward(
    logits_TE: Tensor, top_k: int, sigmoid: bool, normalize: bool, scale: float, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight [T, k], expert int64 [T, k], probabilities [T, E], load int64 [E]); floats as the logits.

    Args:
        logits_TE: float32 or float64 [T, E]; `top_k` ≤ E.
        epsilon: added to the sum that `normalize` divides by.
    """
    logits_TE = logits_TE.contiguous()
    tokens, experts = logits_TE.shape
    weight_Tk = logits_TE.new_empty(tokens, top_k)
    expert_Tk = torch.empty(tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    probabilities_TE = logits_TE.new_empty(tokens, experts)
    load_E = torch.zeros(experts, dtype=torch.int64, device=logits_TE.device)
    grid, blocks = _blocks(tokens, experts)
    if tokens:
        _forward_kernel[grid](
            logits_TE, weight_Tk, expert_Tk, probabilities_TE, load_E, tokens, experts,
            top_k, sigmoid, normalize, scale, epsilon, **blocks, BLOCK_K=triton.next_power_of_2(top_k),
        )  # fmt: skip
    return weight_Tk, expert_Tk, probabilities_TE, load_E


@torch.library.custom_op("moesys::gate_backward", mutates_args=())
@on_its_device
def backward(
    grad_weight_Tk: Tensor | None,
    grad_probabilities_TE: Tensor | None,
    probabilities_TE: Tensor,
    expert_Tk: Tensor,
    sigmoid: bool,
    normalize: bool,
    scale: float,
    epsilon: float,
) -> Tensor:
    """Gradient of the logits [T, E] from those of `forward`'s weights and probabilities, None for zeros."""
    tokens, experts = probabilities_TE.shape
    grad_logits_TE = torch.empty_like(probabilities_TE)
    grid, blocks = _blocks(tokens, experts)
    if tokens:
        _backward_kernel[grid](
            grad_weight_Tk, grad_probabilities_TE, probabilities_TE, expert_Tk, grad_logits_TE,
            tokens, experts, expert_Tk.shape[1], sigmoid, normalize, scale, epsilon,
            grad_weight_Tk is not None, grad_probabilities_TE is not None, **blocks,
        )  # fmt: skip
    return grad_logits_TE


@forward.register_fake
def _(logits_TE, top_k, sigmoid, normalize, scale, epsilon):
    tokens, experts = logits_TE.shape
    chosen = logits_TE.new_empty(tokens, top_k)
    load_E = torch.empty(experts, dtype=torch.int64, device=logits_TE.device)
    return chosen, torch.empty_like(chosen, dtype=torch.int64), logits_TE.new_empty(tokens, experts), load_E


@backward.register_fake
def _(grad_weight_Tk, grad_probabilities_TE, probabilities_TE, expert_Tk, sigmoid, normalize, scale, epsilon):
    return torch.empty_like(probabilities_TE)


def _blocks(tokens: int, experts: int) -> tuple[tuple[int], dict[str, int]]:
    """(grid, sizes of the blocks)."""
    block_e = triton.next_power_of_2(experts)
    block_t = max(1, min(ELEMENTS // block_e, TOKENS))
    return (triton.cdiv(tokens, block_t),), {"BLOCK_T": block_t, "BLOCK_E": block_e}
