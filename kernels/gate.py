"""Scores, the k best experts, their weights and the experts' load, in one pass.

T tokens, E experts, k choices per token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesys.kernels.choose import choose

Score = Literal["softmax", "sigmoid"]

EPSILON = 1e-20
"""Added to the sum of chosen sigmoids, which may all underflow, as in DeepSeek-V3's code."""

FEW = 2**12
"""Most logits that a CPU sorts directly: a faster algorithm pays only for more."""


class GateResult(NamedTuple):
    """The result of a gate on its logits.

    `weight_Tk` and `probabilities_TE` (every expert's score) are differentiable and of the logits' type,
    at least float32; `expert_Tk` int64, best first; `load_E` int64, how often each expert was chosen.
    """

    weight_Tk: Tensor
    expert_Tk: Tensor
    probabilities_TE: Tensor
    load_E: Tensor


def reference(
    logits_TE: Tensor, top_k: int, score: Score = "softmax", normalize: bool = True, scale: float = 1.0
) -> GateResult:
    """`gate` by its definition."""
    # Both scores ascend with the logit, which unlike them neither underflows nor saturates into ties.
    return weigh(logits_TE, _sorted(logits_TE.detach(), top_k), score, normalize, scale)


def gate(
    logits_TE: Tensor, top_k: int, score: Score = "softmax", normalize: bool = True, scale: float = 1.0
) -> GateResult:
    """The `top_k` experts of largest logit for each token; of equal logits the lowest numbers.

    Softmax: Shazeer et al. 2017, without noise (Mixtral normalizes, Qwen2-MoE does not). Sigmoid:
    DeepSeek-V3. Fused as Megatron-Core's router is.

    Args:
        logits_TE: floating [T, E]; computed in float32, or in float64 if they are.
        top_k: k, 1 ≤ k ≤ E.
        score: what makes logits probabilities. Sigmoids of a token do not sum to 1.
        normalize: divide the chosen scores by their sum.
        scale: factor on the weights, after normalisation.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    implementation = choose(logits_TE, "gate")
    if implementation == "triton":
        return GateResult(*_Gate.apply(logits_TE, top_k, score, normalize, scale))
    if implementation == "torch" and logits_TE.dtype == torch.float32:
        return weigh(logits_TE, _best(logits_TE.detach(), top_k), score, normalize, scale)
    return reference(logits_TE, top_k, score, normalize, scale)


def best(scores_TE: Tensor, top_k: int) -> Tensor:
    """The `top_k` experts of largest score for each token, best first: int64 [T, k]; of equals the lowest numbers.

    `scores_TE` floating [T, E]; -inf for experts that are not to be chosen. Not differentiable.
    """
    scores_TE = scores_TE.detach()
    if scores_TE.dtype == torch.float32 and choose(scores_TE, "gate") != "reference":
        return _best(scores_TE, top_k)
    return _sorted(scores_TE, top_k)


def weigh(
    logits_TE: Tensor,
    expert_Tk: Tensor,
    score: Score = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    least_sum: float = 0.0,
) -> GateResult:
    """`gate` where the experts of each token, int64 [T, k], are chosen already, by whatever rule.

    `least_sum`: to normalise them, the chosen scores are divided by this at least.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    probabilities_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    if normalize and score == "softmax" and not least_sum:
        # The same as dividing by their sum, which is 0 where all that are chosen lie far below the best.
        weight_Tk = logits_TE.gather(-1, expert_Tk).softmax(-1)
    else:
        weight_Tk = probabilities_TE.gather(-1, expert_Tk)
        weight_Tk = weight_Tk / _sum(weight_Tk, least_sum) if normalize else weight_Tk
    chosen = expert_Tk.flatten()
    load_E = chosen.new_zeros(logits_TE.shape[1]).scatter_add_(0, chosen, torch.ones_like(chosen))
    weight_Tk = weight_Tk if scale == 1 else weight_Tk * scale
    return GateResult(weight_Tk, expert_Tk, probabilities_TE, load_E)


def _sum(weight_Tk: Tensor, least: float) -> Tensor:
    """The sum of a token's weights [T, 1], never zero."""
    total_T1 = weight_Tk.sum(-1, keepdim=True)
    return total_T1.clamp(min=least) if least else total_T1 + EPSILON


def _sorted(scores_TE: Tensor, top_k: int) -> Tensor:
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()


def _best(logits_TE: Tensor, top_k: int) -> Tensor:
    """The k best experts [T, k] of float32 logits; for many logits in a third of a stable sort's time.

    topk does not define the order of ties, so it gets integers without ties: the bits of the logit, mapped so that they
    compare as the numbers do, followed by the expert's number, descending.
    """
    if logits_TE.numel() <= FEW and not logits_TE.is_cuda:
        return _sorted(logits_TE, top_k)
    bits_TE = (logits_TE + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0, its equal
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    rank_E = torch.arange(logits_TE.shape[1] - 1, -1, -1, device=logits_TE.device)
    return ((ordered_TE.to(torch.int64) << 32) | rank_E).topk(top_k).indices


def _epsilon(score: Score) -> float:
    return EPSILON if score == "sigmoid" else 0.0


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, top_k, score, normalize, scale):  # type: ignore[override]
        from moesys.kernels.triton import gate as kernel

        ctx.set_materialize_grads(False)
        ctx.options = (score == "sigmoid", normalize, scale, _epsilon(score))
        weight_Tk, expert_Tk, probabilities_TE, load_E = kernel.forward(logits_TE, top_k, *ctx.options)
        ctx.mark_non_differentiable(expert_Tk, load_E)
        ctx.save_for_backward(probabilities_TE, expert_Tk)
        return weight_Tk, expert_Tk, probabilities_TE, load_E

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weight_Tk, _, grad_probabilities_TE, __):  # type: ignore[override]
        from moesys.kernels.triton import gate as kernel

        grads = [None if g is None else g.contiguous() for g in (grad_weight_Tk, grad_probabilities_TE)]
        return kernel.backward(*grads, *ctx.saved_tensors, *ctx.options), None, None, None, None
