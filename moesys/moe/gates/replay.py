"""Routing that was recorded in another run."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.moe.counts import occurrences
from moesys.moe.gates.scored import ScoredGate
from moesys.moe.routing import MicroBatch, Routing, Tokens, only


class ReplayGate(ScoredGate):
    """Experts by a table of token numbers, weights by the gate's own softmax at those experts.

    So a benchmark gets a real run's load without its training state, and the gate still learns. Numbers beyond the end
    of the table start over.

    Args:
        hidden, experts, z_loss: see `ScoredGate`.
        normalize: divide a token's weights by their sum.
        scale: factor on the weights, after normalisation.
    """

    def __init__(self, hidden: int, experts: int, normalize: bool = True, scale: float = 1.0, z_loss: float = 0.0):
        super().__init__(hidden, experts, z_loss)
        self.normalize, self.scale = normalize, scale
        self.first, self.table_NK = 0, torch.empty(0, 0)

    def load(self, first: int, table_NK: Tensor) -> None:
        """Use this table: row i int16 [K] are the experts of token `first` + i, −1 where there are fewer."""
        self.first, self.table_NK = first, table_NK

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        if not len(self.table_NK):
            raise ValueError("a replay gate needs a recording: call load")
        logits_TE = self.projection(x_TH)
        expert_TK = self.table_NK[(tokens.number_T - self.first) % len(self.table_NK)].long()
        there_TK = expert_TK >= 0
        if tokens.real_T is not None:
            there_TK &= tokens.real_T[:, None]
        weight_TK = logits_TE.softmax(-1).gather(1, expert_TK.clamp(min=0)) * there_TK
        if self.normalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        token_A = torch.arange(len(x_TH), device=x_TH.device).repeat_interleave(expert_TK.shape[1])
        expert_TK = expert_TK.clamp(min=0)
        load_E = occurrences(expert_TK, self.experts, there_TK)
        routing = Routing(token_A, expert_TK.flatten(), (weight_TK * self.scale).flatten(), load_E=load_E)
        return self.with_losses(only(routing, there_TK.flatten()), logits_TE, scope)
