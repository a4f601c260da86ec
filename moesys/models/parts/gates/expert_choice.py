"""Expert choice: each expert takes its best tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moesys.config.section import Section
from moesys.models.parts.axes import Exchange
from moesys.models.parts.gates.kind import BALANCE, CAPACITY, WEIGHTS, ZERO, GateKind, gathered_scores

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


BINS = 128
"""Bins of the histogram of an expert's scores, from which its threshold is read."""


class ExpertChoiceKeys(Section):
    """Keys of expert choice."""

    causal: bool = False
    """Experts take the tokens above a threshold that follows the quantile of earlier steps, so that
    no token's routing depends on later tokens; load is balanced on average."""


class ExpertChoice(GateKind):
    """Each expert takes its best tokens of the micro-batch (arXiv 2202.09368)."""

    kind = "expert_choice"
    summary = (
        "each expert takes its best tokens of the micro-batch; not causal, thus not for autoregressive models but \
for comparison, unless `causal`"
    )
    aliases = ("ec",)
    keys = ExpertChoiceKeys
    for_megatron = True
    ignores = CAPACITY | BALANCE | ZERO | WEIGHTS
    even = True

    @property
    def mean_choices(self) -> float:
        """Experts take as many tokens as a capacity has room for."""
        return (self.moe.capacity_factor or 1.0) * super().mean_choices

    def exchanges(self, tokens: int, sequences: int) -> Iterator[Exchange]:
        """All tokens' scores, from which experts choose, unless they have thresholds."""
        if not self.moe.gate.causal:
            yield from gathered_scores(tokens, self.moe.experts)

    @property
    def step_statistics(self) -> int:
        """The histograms of scores that thresholds follow."""
        return BINS * self.moe.experts if self.moe.gate.causal else 0

    @property
    def token_by_token(self) -> bool:
        """Thresholds see one token; experts that choose see all."""
        return self.moe.gate.causal

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.gates.expert_choice import CausalExpertChoiceGate, ExpertChoiceGate

        m = self.moe
        given = (hidden, m.experts, m.top_k, m.capacity_factor or 1.0, m.z_loss)
        return CausalExpertChoiceGate(*given, bins=BINS) if m.gate.causal else ExpertChoiceGate(*given)
