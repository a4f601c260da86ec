"""SMEAR: experts are merged, not chosen."""

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
class Merge(GateOutput):
    """One merged feed-forward for each of B sequences; its weights are Σ_e share_BE · weights of expert e."""

    share_BE: Tensor

    def attach(self, loss: Tensor) -> None:
        self.share_BE = attach_loss(self.share_BE, loss)

    def run(self, x_TH: Tensor, dispatcher: Dispatcher, experts: Experts) -> Tensor:
        sequences = len(self.share_BE)
        counts_B = torch.full((sequences,), len(x_TH) // sequences, device=x_TH.device)
        return experts(x_TH, counts_B, share_GE=self.share_BE)


class SmearGate(Gate):
    """Soft merging of experts with adaptive routing (Muqeeth et al. 2023, arXiv 2306.03745).

    A sequence's shares are softmax(mean_s(x_s) · w). It costs one expert's arithmetic per token, and merging
    all experts' weights once per sequence; fully differentiable.

    **Not causal**: the mean is over the whole sequence. For encoders and for comparison, not for
    autoregressive models.

    Args:
        hidden: size of a token.
        experts: E.
    """

    def __init__(self, hidden: int, experts: int):
        super().__init__()
        self.projection = GateProjection(hidden, experts)
        self.experts = experts

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Merge:
        assert scope.size == 1, "sequences must be whole"
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        mean_BH = x_TH.to(wide).unflatten(0, (tokens.sequences, -1)).mean(1)
        share_BE = self.projection(mean_BH).softmax(-1)
        # The experts' shares of the tokens: there are no assignments to count.
        load_E = share_BE.detach().sum(0) * (len(x_TH) / tokens.sequences)
        return Merge(share_BE, load_E=load_E)
