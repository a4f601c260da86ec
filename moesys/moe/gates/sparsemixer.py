"""SparseMixer: experts chosen one after another, each with the share of what is near the best of those left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesys.kernels.gate import GateResult, weigh
from moesys.moe import noise
from moesys.moe.counts import occurrences
from moesys.moe.gates.top_k import TopKGate
from moesys.moe.routing import Tokens

SURE = 0.75
"""Chance of a third of the weight for an expert that was drawn and is not the best (Heun's third-order method)."""


class SparseMixerGate(TopKGate):
    """The routing of Phi-3.5-MoE (SparseMixer-v2, arXiv 2409.12136), for any k.

    Each choice is among experts that are not chosen yet and whose logit is within `threshold` of the best of these:
    (best − logit) / max(|logit|, best) ≤ 2 · threshold. The weight is the expert's softmax over them. In evaluation
    the best is chosen. In training an expert is drawn by the softmax, and if it is not the best, its weight counts a
    third, in three quarters of the cases, in forward alone. As transformers has it; draws hang on the token's number.
    """

    def __init__(self, *given: Any, threshold: float, **options: Any):
        super().__init__(*given, **(options | {"normalize": False}))
        self.threshold = threshold
        # Hashed here: `torch.compile` does not trace the hash.
        layer = self.randomness.layer
        self.draws = [noise.key(layer, f"sparsemixer/{choice}") for choice in range(2 * self.top_k)]

    def choose(self, logits_TE: Tensor, tokens: Tokens) -> GateResult:
        if self.forced is not None:
            return weigh(logits_TE, self.forced(tokens), "softmax", False, self.scale)
        wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        left_TE, experts, weights = wide_TE, [], []
        for choice in range(self.top_k):
            expert_T1, weight_T1 = self._one(wide_TE, left_TE, tokens.number_T, choice)
            left_TE = left_TE.scatter(-1, expert_T1, -torch.inf)
            experts.append(expert_T1)
            weights.append(weight_T1)
        expert_Tk = torch.cat(experts, -1)
        load_E = occurrences(expert_Tk, self.experts)
        return GateResult(torch.cat(weights, -1) * self.scale, expert_Tk, wide_TE.softmax(-1), load_E)

    def _one(self, logits_TE: Tensor, left_TE: Tensor, number_T: Tensor, choice: int) -> tuple[Tensor, Tensor]:
        """One expert of each token [T, 1] and its weight; `left_TE`: logits, −∞ of experts that are chosen."""
        with torch.no_grad():
            best_T1, first_T1 = left_TE.max(-1, keepdim=True)
            scale_TE = logits_TE.abs().clamp(min=best_T1)
            far_TE = (best_T1 - logits_TE) / scale_TE > 2 * self.threshold
        near_TE = left_TE.masked_fill(far_TE, -torch.inf)
        share_TE = near_TE.softmax(-1)
        if not self.training:
            return first_T1, share_TE.gather(-1, first_T1)
        # The largest of logits with Gumbel noise is a draw by their softmax.
        drawn_TE = noise.uniform(number_T, logits_TE.shape[-1], self.draws[2 * choice]).to(logits_TE.dtype)
        expert_T1 = (near_TE.detach() - (-drawn_TE.log()).log()).argmax(-1, keepdim=True)
        share_T1 = share_TE.gather(-1, expert_T1)
        sure_T1 = noise.uniform(number_T, 1, self.draws[2 * choice + 1]) > SURE
        factor_T1 = ((expert_T1 == first_T1) | sure_T1).to(share_T1.dtype) * 0.6667 + 0.3333
        return expert_T1, share_T1 + (share_T1 * (factor_T1 - 1)).detach()
