"""Token choice among groups of experts, the best of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesys.errors import Problem
from moesys.models.parts.gates.kind import ZERO, BiasKeys, ForceKeys, RandomKeys
from moesys.models.parts.gates.top_k import TokenChoice
from moesys.words import divisors

if TYPE_CHECKING:
    from moesys.moe.gates import TopKGate


class PrototypeKeys(RandomKeys, BiasKeys, ForceKeys):
    """Keys of prototypes."""


class Prototype(TokenChoice):
    """Experts in top_k groups; each token uses the best of each (M6-T, arXiv 2105.15082)."""

    kind = "prototype"
    summary = "the experts in top_k groups, the best of each is used (M6-T; its weights are those of normalize: false)"
    keys = PrototypeKeys
    ignores = frozenset({"bias_rate", "selection_bias", "normalize_min", "load_loss", "balance_counts"}) | ZERO

    def check(self) -> list[Problem]:
        """Groups are equal."""
        m, problems = self.moe, super().check()
        if m.experts % m.top_k:
            rule = f"gate prototype makes top_k({m.top_k}) groups: it must divide model.moe.experts({m.experts})"
            problems.append(Problem("model.moe.top_k", rule, f"one of {divisors(m.experts)}"))
        return problems

    def gate_class(self) -> type[TopKGate]:
        """The class of the gate."""
        from moesys.moe.gates import PrototypeGate

        return PrototypeGate
