"""Token choice by one expert after another, drawn in training."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from moesys.config.section import PositiveFloat
from moesys.errors import Problem
from moesys.models.parts.gates.kind import WEIGHTS, ZERO, ForceKeys
from moesys.models.parts.gates.top_k import TokenChoice

if TYPE_CHECKING:
    from moesys.moe.gates import TopKGate


class SparseMixerKeys(ForceKeys):
    """Keys of SparseMixer."""

    threshold: PositiveFloat = 0.01
    """Experts compete whose logit is below the best by at most twice this share of the larger of the two
    (Phi-3.5-MoE: router_jitter_noise)."""


class SparseMixer(TokenChoice):
    """One expert after another, by the softmax of those near the best (Phi-3.5-MoE, arXiv 2409.12136)."""

    kind = "sparsemixer"
    summary = "experts one after another among those near the best, drawn in training (Phi-3.5-MoE's SparseMixer)"
    aliases = ("sparse_mixer", "phi")
    keys = SparseMixerKeys
    ignores = frozenset({"bias_rate", "selection_bias", "load_loss"}) | (WEIGHTS - {"scale"}) | ZERO

    def check(self) -> list[Problem]:
        """None beside those of all gates: weights are never normalised."""
        return []

    def gate_class(self) -> type[TopKGate] | Any:
        """The class of the gate."""
        from moesys.moe.gates.sparsemixer import SparseMixerGate

        return partial(SparseMixerGate, threshold=self.moe.gate.threshold)
