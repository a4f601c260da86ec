"""A gate that sends tokens to experts in turn, by their numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moesys.config.section import Section, Seed
from moesys.models.parts.axes import Weight
from moesys.models.parts.gates.kind import NOT_LEARNED, GateKind
from moesys.moe.gates.gate import Gate
from moesys.moe.gates.per_token import route_evenly
from moesys.moe.routing import MicroBatch, Routing, Tokens


class InTurnKeys(Section):
    """Keys of the gate."""

    first: Seed = 0
    """in_turn: the expert of token 0."""


class InTurnGate(Gate):
    """Token t goes to experts first + t, first + t + 1, …"""

    def __init__(self, experts: int, top_k: int, first: int):
        super().__init__()
        self.experts, self.top_k, self.first = experts, top_k, first

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        """The routing of tokens x [T, H]."""
        choice_K = torch.arange(self.top_k, device=x_TH.device)
        expert_TK = (tokens.number_T.clamp(min=0)[:, None] + choice_K + self.first) % self.experts
        return route_evenly(expert_TK, self.experts, tokens.real_T)


class InTurn(GateKind):
    """Experts in turn."""

    kind = "in_turn"
    summary = "by the token's number, in turn"
    keys = InTurnKeys
    ignores = NOT_LEARNED

    def weights(self, hidden: int) -> Iterator[Weight]:
        """Nothing is learned."""
        yield from ()

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        return InTurnGate(self.moe.experts, self.moe.top_k, self.moe.gate.first + layer)
