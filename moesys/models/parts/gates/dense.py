"""Every expert for every token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesys.models.parts.gates.kind import FIXED, WEIGHTS, GateKind

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


class Dense(GateKind):
    """All experts, weighed by a softmax (the mixture of Jacobs et al. 1991)."""

    kind = "dense"
    summary = "every expert"
    ignores = frozenset({"top_k"}) | FIXED | WEIGHTS
    even = True

    @property
    def choices(self) -> int:
        """All experts."""
        return self.moe.experts

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.gates.dense import DenseGate

        return DenseGate(hidden, self.moe.experts, self.moe.z_loss)
