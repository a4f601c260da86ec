"""The base class of gates that compute one logit per token and expert."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from moesys.moe import losses
from moesys.moe.gates.gate import Gate
from moesys.moe.gates.projection import GateProjection
from moesys.moe.routing import GateOutput, MicroBatch

D = TypeVar("D", bound=GateOutput)


class ScoredGate(Gate):
    """A gate with logits x · w, float32.

    Args:
        hidden: size of a token.
        experts: E.
        z_loss: coefficient of the router z-loss; 0 turns it off.
    """

    def __init__(self, hidden: int, experts: int, z_loss: float = 0.0):
        super().__init__()
        self.projection = GateProjection(hidden, experts)
        self.experts, self.z_loss = experts, z_loss

    def with_losses(self, output: D, logits_TE: Tensor, scope: MicroBatch) -> D:
        """`output` with the losses on its logits, in training."""
        if self.z_loss and self.training:
            output.losses["z"] = self.z_loss * losses.router_z(logits_TE, scope)
        return output
