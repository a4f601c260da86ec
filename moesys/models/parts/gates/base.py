"""The best balanced assignment of tokens to experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesys.errors import Problem
from moesys.models.parts.gates.kind import BalancedAssignment

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


class Base(BalancedAssignment):
    """One expert per token, the best balanced assignment in training (BASE, arXiv 2103.16716)."""

    kind = "base"
    summary = "one expert per token, the best balanced assignment in training (BASE)"

    def check(self) -> list[Problem]:
        """Each token has one expert."""
        if self.moe.top_k == 1:
            return []
        rule = f"gate base assigns each token to one expert, and top_k is {self.moe.top_k}"
        return [Problem("model.moe.top_k", rule, "set it to 1, or use gate sinkhorn")]

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.gates.base import BaseGate

        return BaseGate(hidden, self.moe.experts, self.moe.z_loss)
