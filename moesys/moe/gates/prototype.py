"""k groups of experts, each with a choice of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels.gate import GateResult, best
from moesys.moe.counts import occurrences
from moesys.moe.gates.top_k import TopKGate
from moesys.moe.routing import Tokens


class PrototypeGate(TopKGate):
    """Expert prototyping (M6-T, arXiv 2105.15082): E experts in k equal groups, the best of each is used.

    The scores are a softmax within each group. The paper's weights are these scores: `normalize=False`;
    its layer's output is then a sum of k gates of their own.
    """

    def choose(self, logits_TE: Tensor, tokens: Tokens) -> GateResult:
        size = self.experts // self.top_k
        scores_TE = logits_TE.unflatten(-1, (self.top_k, size)).softmax(-1).flatten(-2)
        if self.forced is not None:
            expert_Tk = self.forced(tokens)
        else:
            first_k = size * torch.arange(self.top_k, device=logits_TE.device)
            expert_Tk = best(logits_TE.reshape(-1, size), 1).view(-1, self.top_k) + first_k
        weight_Tk = scores_TE.gather(-1, expert_Tk)
        if self.normalize:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
        return GateResult(weight_Tk * self.scale, expert_Tk, scores_TE, occurrences(expert_Tk, self.experts))

    def _normalized(self, probabilities_TE: Tensor) -> Tensor:
        return probabilities_TE / self.top_k
