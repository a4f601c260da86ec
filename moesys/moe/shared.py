"""Mixes: they join the branch of shared experts, which takes every token, with the routed one.

T tokens, H hidden. A mix computes its factors before tokens are dispatched (`forward`), so that its loss can enter
backward with the gate's; the two outputs are joined later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from moesys.moe.gates.projection import GateProjection
from moesys.moe.routing import MicroBatch


@dataclass(frozen=True)
class Mixture:
    """The output of a mix: float32 factors [T, 1] of the two branches, None for 1.

    `losses` are this device's shares, coefficients included, as in `GateOutput`.
    """

    routed_T1: Tensor | None = None
    dense_T1: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)

    def join(self, routed_BSH: Tensor, dense_BSH: Tensor) -> Tensor:
        """The layer's output, in the shape and type of both branches' outputs."""
        return _times(routed_BSH, self.routed_T1) + _times(dense_BSH, self.dense_T1)


def _times(x_BSH: Tensor, factor_T1: Tensor | None) -> Tensor:
    return x_BSH if factor_T1 is None else x_BSH * factor_T1.to(x_BSH.dtype).view(*x_BSH.shape[:-1], 1)


class Mix(nn.Module):
    """`routed + dense`: shared experts as DeepSeekMoE has them (arXiv 2401.06066)."""

    def forward(self, x_TH: Tensor, scope: MicroBatch) -> Mixture:
        """The factors for tokens x [T, H]; `scope` is their micro-batch."""
        return Mixture()


class GatedMix(Mix):
    """`routed + σ(x · w) · dense`: Qwen2-MoE (arXiv 2407.10671)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.projection = GateProjection(hidden, 1)

    def forward(self, x_TH: Tensor, scope: MicroBatch) -> Mixture:
        return Mixture(dense_T1=self.projection(x_TH).sigmoid())


class ResidualMix(Mix):
    """`c₀ · routed + c₁ · dense` with c = softmax(x · W + b): DeepSpeed's Residual-MoE (arXiv 2201.05596)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.projection = GateProjection(hidden, 2, bias=True)

    def forward(self, x_TH: Tensor, scope: MicroBatch) -> Mixture:
        routed_T, dense_T = self.projection(x_TH).softmax(-1).unbind(-1)
        return Mixture(routed_T[:, None], dense_T[:, None])


class ConditionalMix(Mix):
    """`g · routed + (1 − g) · dense` with g = σ(x · w + b): NLLB's conditional MoE routing (arXiv 2207.04672).

    Its loss `loss · |mean g − budget|`, the mean over the micro-batch's tokens, lets a share `budget` of the
    output come from the routed experts. As in its authors' fairseq, save that they take the mean over the
    tokens of all layers together, and that there is no dropout of g.
    """

    def __init__(self, hidden: int, budget: float, loss: float):
        super().__init__()
        self.projection = GateProjection(hidden, 1, bias=True)
        self.budget, self.loss = budget, loss

    def forward(self, x_TH: Tensor, scope: MicroBatch) -> Mixture:
        g_T1 = self.projection(x_TH).sigmoid()
        return Mixture(g_T1, 1 - g_T1, self._losses(g_T1, scope))

    def _losses(self, g_T1: Tensor, scope: MicroBatch) -> dict[str, Tensor]:
        return {"cmr": self.loss * self._distance(g_T1, scope)} if self.loss and self.training else {}

    def _distance(self, g_T1: Tensor, scope: MicroBatch) -> Tensor:
        """This device's share of |mean g − budget|."""
        excess = g_T1.mean() - self.budget
        return excess / scope.size * scope.sum(excess.detach()).sign()


MixKind = Literal["add", "gate", "residual", "cmr"]


def build_mix(kind: MixKind, hidden: int, budget: float = 0.8, loss: float = 0.1) -> Mix:
    """The mix of this kind; `budget` and `loss` belong to "cmr"."""
    if kind == "cmr":
        return ConditionalMix(hidden, budget, loss)
    return {"add": lambda _: Mix(), "gate": GatedMix, "residual": ResidualMix}[kind](hidden)
