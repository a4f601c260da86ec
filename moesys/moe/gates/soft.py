"""Soft MoE: experts compute mixtures of tokens, not tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.moe.dispatch import Dispatcher
from moesys.moe.experts import Experts
from moesys.moe.gates.gate import Gate
from moesys.moe.gates.projection import GateProjection
from moesys.moe.routing import GateOutput, MicroBatch, Tokens, attach_loss


@dataclass
class Slots(GateOutput):
    """Mixtures of each of B sequences' S tokens, P of them, P / E per expert, in the order of experts.

    `dispatch_BSP` are the shares of tokens in slots, `combine_BSP` of slots in tokens; both float32.
    """

    dispatch_BSP: Tensor
    combine_BSP: Tensor

    def attach(self, loss: Tensor) -> None:
        self.combine_BSP = attach_loss(self.combine_BSP, loss)

    def run(self, x_TH: Tensor, dispatcher: Dispatcher, experts: Experts) -> Tensor:
        sequences, length, slots = self.dispatch_BSP.shape
        e = dispatcher.experts
        x_BSH = x_TH.view(sequences, length, -1)
        slots_BPH = self.dispatch_BSP.mT.to(x_TH.dtype) @ x_BSH
        rows = slots_BPH.unflatten(1, (e, -1)).transpose(0, 1)  # [E, B, P / E, H]
        each = sequences * slots // e
        counts_E = torch.full((e,), each, device=x_TH.device)
        out = dispatcher.run(rows.reshape(-1, x_TH.shape[1]), counts_E, experts, each)
        out_BPH = out.view(rows.shape).transpose(0, 1).flatten(1, 2)
        return (self.combine_BSP.to(x_TH.dtype) @ out_BPH).view_as(x_TH)


class SoftGate(Gate):
    """Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951), over each sequence.

    With logits L = x · Φ [S, P] of a sequence, slot p computes with Σ_s softmax_s(L)_sp · x_s, and token s
    gets Σ_p softmax_p(L)_sp · y_p. No token is dropped, no expert idle, nothing discrete.

    **Not causal**: every output depends on every token of the sequence. For encoders and for comparison, not
    for autoregressive models.

    Args:
        hidden: size of a token.
        experts: E.
        slots: slots per expert, P / E.
    """

    def __init__(self, hidden: int, experts: int, slots: int):
        super().__init__()
        self.projection = GateProjection(hidden, experts * slots)
        self.experts, self.slots = experts, slots

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Slots:
        assert scope.size == 1, "sequences must be whole"
        logits_BSP = self.projection(x_TH).unflatten(0, (tokens.sequences, -1))
        rows = tokens.sequences * self.slots
        load_E = torch.full((self.experts,), rows, device=x_TH.device)
        return Slots(logits_BSP.softmax(1), logits_BSP.softmax(2), load_E=load_E)
