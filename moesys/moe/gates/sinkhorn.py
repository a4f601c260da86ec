"""Balanced routing by Sinkhorn's algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.moe.gates.per_token import route
from moesys.moe.gates.scored import ScoredGate
from moesys.moe.routing import MicroBatch, Routing, Tokens

ROUNDS = 32
"""Rounds of normalisation. Their number is fixed: waiting for a tolerance would stall the device, and end
in different rounds on different layouts."""


class SinkhornGate(ScoredGate):
    """k best experts after scaling exp(logits) [T, E] to equal sums per token and per expert.

    The micro-batch's tokens are balanced in training; in evaluation each token takes its k largest logits.
    Weights are of the plain logits: sigmoid if k = 1, else softmax over all experts, not normalised over
    the chosen. As in Megatron-Core; after Clark et al. 2022 (arXiv 2202.01169).

    Args:
        hidden, experts, z_loss: see `ScoredGate`.
        top_k: k.
    """

    def __init__(self, hidden: int, experts: int, top_k: int, z_loss: float = 0.0):
        super().__init__(hidden, experts, z_loss)
        self.top_k = top_k

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        logits_TE = self.projection(x_TH)
        expert_Tk = self._best(logits_TE.detach(), tokens, scope) if self.forced is None else self.forced(tokens)
        probability_TE = logits_TE.sigmoid() if self.top_k == 1 else logits_TE.softmax(-1)
        routing = route(expert_Tk, probability_TE.gather(1, expert_Tk), self.experts, tokens.real_T)
        return self.with_losses(routing, logits_TE, scope)

    def _best(self, logits_TE: Tensor, tokens: Tokens, scope: MicroBatch) -> Tensor:
        if self.training:
            every, order = scope.gather(logits_TE), scope.gather(tokens.number_T).argsort()
            # A factor per token changes no order among its experts: the experts' factors are enough.
            logits_TE = logits_TE + expert_factors(every[order])
        return logits_TE.topk(self.top_k).indices


# One operation: many rounds of one small step would take a compiler minutes, unrolled.
@torch.library.custom_op("moesys::sinkhorn_factors", mutates_args=())
def expert_factors(logits_TE: Tensor) -> Tensor:
    """Logarithms [E] of the factors that, with one per token, give exp(logits) equal sums per token and expert."""
    factor_E = torch.zeros_like(logits_TE[0])
    for _ in range(ROUNDS):
        factor_T1 = -(logits_TE + factor_E).logsumexp(1, keepdim=True)
        factor_E = -(logits_TE + factor_T1).logsumexp(0)
    return factor_E


@expert_factors.register_fake
def _(logits_TE: Tensor) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape[1])
