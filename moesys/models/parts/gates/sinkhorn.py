"""Token choice that Sinkhorn's algorithm balances."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesys.models.parts.gates.kind import BalancedAssignment

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


class Sinkhorn(BalancedAssignment):
    """k experts per token, balanced by Sinkhorn's algorithm in training (Megatron-Core)."""

    kind = "sinkhorn"
    summary = "k experts per token, balanced by Sinkhorn's algorithm in training (Megatron-Core)"

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.gates.sinkhorn import SinkhornGate

        return SinkhornGate(hidden, self.moe.experts, self.moe.top_k, self.moe.z_loss)
