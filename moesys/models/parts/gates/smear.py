"""One expert per sequence, merged from all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesys.models.parts.axes import Weight
from moesys.models.parts.gate import NOT_LEARNED, GateKind

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


class Smear(GateKind):
    """One expert per sequence, whose weights are mixtures of all (SMEAR, arXiv 2306.03745)."""

    kind = "smear"
    summary = "one expert per sequence, merged from all (SMEAR); not causal"
    ignores = frozenset({"top_k"}) | NOT_LEARNED
    even = True
    counted = False
    whole = dict.fromkeys(("cp", "tp"), "computes over whole sequences") | dict.fromkeys(
        ("ep", "etp"), "merges the weights of all experts"
    )

    @property
    def choices(self) -> int:
        """The merged expert."""
        return 1

    @property
    def active(self) -> float:
        """The merged expert is made of all."""
        return 1.0

    def multiply_adds(self, weight: Weight, seq_len: int) -> float:
        """A token passes one expert; merging, and the gate, are once for a sequence."""
        once = 1 / seq_len
        return self.mean_choices / self.moe.experts + once if weight.routed else once

    @property
    def token_by_token(self) -> bool:
        """The merged expert is made by all tokens."""
        return False

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.gates.smear import SmearGate

        return SmearGate(hidden, self.moe.experts)
