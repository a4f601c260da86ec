"""Dense gating: every token to every expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.moe.gates.per_token import route
from moesys.moe.gates.scored import ScoredGate
from moesys.moe.routing import MicroBatch, Routing, Tokens


class DenseGate(ScoredGate):
    """Σ_e softmax(x·w)_e · expert_e(x): the mixture before it was made sparse (Jacobs et al. 1991).

    It costs E feed-forwards per token: a reference for what sparse gates give up.
    """

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        logits_TE = self.projection(x_TH)
        every_TE = torch.arange(self.experts, device=x_TH.device).expand(logits_TE.shape)
        routing = route(every_TE, logits_TE.softmax(-1), self.experts, tokens.real_T)
        return self.with_losses(routing, logits_TE, scope)
