"""Token choice that Sinkhorn's algorithm balances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moesys.models.parts.axes import Exchange
from moesys.models.parts.gates.kind import FIXED, WEIGHTS, ForceKeys, GateKind, gathered_scores

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


class Sinkhorn(GateKind):
    """k experts per token, balanced by Sinkhorn's algorithm in training (Megatron-Core)."""

    kind = "sinkhorn"
    summary = "k experts per token, balanced by Sinkhorn's algorithm in training (Megatron-Core)"
    keys = ForceKeys
    for_megatron = True
    ignores = FIXED | WEIGHTS

    def exchanges(self, tokens: int, sequences: int) -> Iterator[Exchange]:
        """All tokens' scores, which are balanced together."""
        if self.moe.gate.force == "none":
            yield from gathered_scores(tokens, self.moe.experts)

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.gates.sinkhorn import SinkhornGate

        return SinkhornGate(hidden, self.moe.experts, self.moe.top_k, self.moe.z_loss)
