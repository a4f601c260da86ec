"""Token choice: each token goes to its k best experts."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING, Any

from moesys.errors import Problem
from moesys.models.parts.axes import Axis, Exchange, Kept, Weight
from moesys.models.parts.gates.kind import NUMBER, SCORE, BiasKeys, ChoiceKeys, GateKind
from moesys.words import divisors

if TYPE_CHECKING:
    from torch import nn

    from moesys.moe.gates import Gate, TopKGate


class TokenChoice(GateKind):
    """The base of gates that choose each token's best candidates."""

    def weights(self, hidden: int) -> Iterator[Weight]:
        """The projection, and the width of noise."""
        candidate = Axis("candidate", self.candidates)
        yield from self.projection_weights(hidden)
        if self.moe.gate.noise == "gaussian":
            yield Weight("noise.weight", (candidate, Axis("hidden", hidden)))

    def projection_weights(self, hidden: int) -> Iterator[Weight]:
        """What makes logits."""
        candidate = Axis("candidate", self.candidates)
        yield Weight("projection.weight", (candidate, Axis("hidden", hidden)))
        if self.moe.gate.bias:
            yield Weight("projection.bias", (candidate,), "bias")

    def kept(self, hidden: int, shape: Any) -> Iterator[Kept]:
        """Jitter's factors, too, and what they give, in float32."""
        yield from super().kept(hidden, shape)
        if self.moe.gate.jitter:
            yield Kept(2 * hidden, "tokens", width=4)

    @property
    def even_rows(self) -> bool:
        """Whether experts are filled up to their capacity."""
        return self.moe.capacity_factor is not None and self.moe.pad_to_capacity

    def assignments(self, tokens: int, ranks: int, seq_len: int) -> float:
        """Each token's choices, or as many for each expert as it takes of the whole micro-batch."""
        m = self.moe
        if not self.even_rows or m.capacity_factor is None or m.zero_computation:
            return super().assignments(tokens, ranks, seq_len)
        taken = ceil(m.capacity_factor * tokens * ranks * m.top_k / m.experts * (1 - 1e-12))
        return m.experts * min(max(taken, m.min_capacity), tokens)

    def exchanges(self, tokens: int, sequences: int) -> Iterator[Exchange]:
        """What orders assignments where capacity is limited, and the loads that losses are computed from."""
        m, assigned = self.moe, tokens * self.moe.top_k
        if m.capacity_factor is not None:
            by = {"weight": (SCORE,), "position": (), "choice": (NUMBER,), "priority": (SCORE, NUMBER)}[m.drop]
            for width in (NUMBER, *by, NUMBER):
                yield Exchange("all_gather", width * assigned)
        of_load = SCORE * self.candidates
        if m.global_balance_loss:
            yield Exchange("all_reduce", NUMBER * self.candidates, losses=True, over_data=True)
        if m.balance_loss:
            yield Exchange("all_reduce", of_load, losses=True)
        if m.sequence_balance_loss:
            yield Exchange("all_reduce", of_load * sequences, losses=True)
        for coefficient in (m.importance_loss, m.load_loss):
            if coefficient:
                yield Exchange("all_reduce", of_load, losses=True)

    @property
    def step_statistics(self) -> int:
        """Loads for the bias and for the global loss."""
        return self.candidates * (bool(self.moe.bias_rate) + bool(self.moe.global_balance_loss))

    @property
    def first_statistics(self) -> int:
        """The same, where the global loss needs its load before."""
        return self.step_statistics if self.moe.global_balance_loss else 0

    def check(self) -> list[Problem]:
        """What k, weights and groups must be."""
        m, problems = self.moe, []
        if m.gate.force == "none" and m.top_k == 1 < self.candidates and m.normalize:
            rule = "one weight divided by itself is 1, with model.moe.top_k 1: the gate would not learn from what its "
            rule += "experts do"
            problems.append(Problem("model.moe.normalize", rule, "set normalize: false"))
        if m.normalize_min and not m.normalize:
            rule = f"({m.normalize_min:g}) has no meaning: model.moe.normalize is false"
            problems.append(Problem("model.moe.normalize_min", rule, "set normalize: true, or remove it"))
        return problems

    def projection(self, hidden: int) -> nn.Module:
        """What makes logits of tokens."""
        from moesys.moe.gates.projection import GateProjection

        return GateProjection(hidden, self.candidates, self.moe.gate.bias)

    def gate_class(self) -> type[TopKGate]:
        """The class of the gate."""
        from moesys.moe.gates import TopKGate

        return TopKGate

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.capacity import Capacity
        from moesys.moe.gates.top_k import Groups, Randomness
        from moesys.moe.losses import Balance
        from moesys.moe.zero import ZeroRule

        m, g = self.moe, self.moe.gate
        zero = ZeroRule(m.experts, m.zero_computation, m.zero_variant, m.zero_tau) if m.zero_computation else None
        return self.gate_class()(
            hidden,
            m.experts,
            m.top_k,
            score=g.score,
            normalize=m.normalize,
            scale=m.scale,
            bias_rate=m.bias_rate,
            selection_bias=m.selection_bias,
            least_sum=m.normalize_min,
            groups=Groups(g.groups, g.groups_kept, g.group_score) if g.groups > 1 else None,
            randomness=Randomness(g.noise == "gaussian", g.jitter, g.second == "random", layer),
            capacity=Capacity(m.capacity_factor, m.eval_capacity_factor, m.min_capacity, m.drop, m.pad_to_capacity),
            balance=Balance(
                m.balance_loss,
                m.sequence_balance_loss,
                m.global_balance_loss,
                m.z_loss,
                m.importance_loss,
                m.load_loss,
            ),
            counts=m.balance_counts,
            zero=zero,
            projection=self.projection(hidden),
        )


class TopKKeys(ChoiceKeys, BiasKeys):
    """Keys of token choice."""


class TopK(TokenChoice):
    """Each token goes to its k best experts (GShard, Switch, Mixtral, DeepSeek-V3)."""

    kind = "top_k"
    summary = "each token goes to its k best experts"
    aliases = ("switch", "token_choice", "gshard", "mixtral", "noisy_top_k")
    keys = TopKKeys

    def check(self) -> list[Problem]:
        """What k, weights and groups must be."""
        return super().check() + check_second(self.moe) + check_groups(self.moe)


def check_second(moe: Any) -> list[Problem]:
    """GShard's second expert is the second of two."""
    if moe.gate.second != "random" or moe.top_k == 2:
        return []
    rule = f"random is about the second of two experts, and model.moe.top_k is {moe.top_k}"
    return [Problem("model.moe.gate.second", rule, "set model.moe.top_k: 2")]


def check_groups(moe: Any) -> list[Problem]:
    """What groups of experts must be."""
    gate, problems = moe.gate, []
    if gate.groups_kept > gate.groups:
        rule = f"must be at most model.moe.gate.groups({gate.groups})"
        problems.append(Problem("model.moe.gate.groups_kept", rule, f"choose 1 to {gate.groups}"))
    if gate.groups == 1:
        return problems
    if moe.zero_computation:
        rule = f"zero-computation experts({moe.zero_computation}) belong to no group"
        problems.append(Problem("model.moe.gate.groups", rule, "use either"))
    if moe.experts % gate.groups:
        rule = f"must divide model.moe.experts({moe.experts})"
        return [*problems, Problem("model.moe.gate.groups", rule, f"one of {divisors(moe.experts)}")]
    size = moe.experts // gate.groups
    if moe.top_k > gate.groups_kept * size:
        most = gate.groups_kept * size
        rule = f"must be at most groups_kept({gate.groups_kept}) · experts per group({size}) = {most}"
        problems.append(Problem("model.moe.top_k", rule, "keep more groups, or choose fewer experts"))
    if gate.group_score == "top2" and size < 2:
        rule = f"needs two experts per group, and experts({moe.experts}) / groups({gate.groups}) is {size}"
        problems.append(Problem("model.moe.gate.group_score", rule, "use max, or fewer groups"))
    return problems
