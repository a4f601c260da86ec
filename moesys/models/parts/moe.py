"""MoE layers: a gate, routed experts, and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moesys.errors import Problem
from moesys.models.parts import expert_rules
from moesys.models.parts.axes import Axis, Exchange, Kept, Weight
from moesys.models.parts.feed_forward import DenseFeedForward
from moesys.models.parts.gates import rules as gate_rules
from moesys.models.parts.gates.kind import GateKind, describe, experts_apart
from moesys.models.parts.part import Part

if TYPE_CHECKING:
    from torch import nn

    from moesys.config.schema import MoEConfig

MIX_OUTPUTS = {"add": 0, "gate": 1, "residual": 2, "cmr": 1}
"""Outputs of the linear map that mixes shared experts in, by `shared_mix`."""
MIX_BRANCHES = {"add": 0, "gate": 1, "residual": 2, "cmr": 2}
"""Branches whose outputs a mix multiplies, and keeps, by `shared_mix`."""


LOSSES = {
    "balance": "balance_loss",
    "sequence_balance": "sequence_balance_loss",
    "global_balance": "global_balance_loss",
    "z": "z_loss",
    "importance": "importance_loss",
    "load_loss": "load_loss",
    "cmr": "cmr_coefficient",
}
"""The losses that layers report, and the keys of model.moe that hold their coefficients."""

COUNTS = ("calls", "dropped", "zero")
"""The counts that layers report beside losses and load: passes, dropped assignments, and those to zero-computation
experts."""


@dataclass(frozen=True)
class MoEFeedForward(Part):
    """The MoE layer of a block.

    Attributes:
        m: the section of its keys.
        hidden: size of the stream.
        layer: number of the block, which makes random routing differ between layers.
    """

    m: MoEConfig
    hidden: int
    layer: int

    @cached_property
    def gate(self) -> GateKind:
        """Its gate."""
        return describe(self.m)

    @cached_property
    def shared(self) -> DenseFeedForward | None:
        """Its shared experts, computed as one feed-forward."""
        m = self.m
        if not m.shared_experts:
            return None
        return DenseFeedForward(self.hidden, m.shared_width, m.activation, "model.moe.shared_experts")

    def weights(self) -> Iterator[Weight]:
        """Gate, experts, zero-computation experts, shared experts, mix."""
        m, hidden = self.m, Axis("hidden", self.hidden)
        for weight in self.gate.weights(self.hidden):
            yield _router(weight, "gate.")
        yield from (w.within("experts.") for w in self._experts())
        if m.constant_experts:
            yield Weight("zero.mix.weight", (Axis("candidate", 2 * m.constant_experts), hidden))
            yield Weight("zero.constant.weight", (hidden, Axis("candidate", m.constant_experts)))
        if self.shared is None:
            return
        yield from (w.within("shared.") for w in self.shared.weights())
        outputs = Axis("output", MIX_OUTPUTS[m.shared_mix])
        if outputs.count:
            yield _router(Weight("projection.weight", (outputs, hidden)), "mix.")
        if m.shared_mix in ("residual", "cmr"):
            yield _router(Weight("projection.bias", (outputs,), "bias"), "mix.")

    def _experts(self) -> Iterator[Weight]:
        m, hidden = self.m, Axis("hidden", self.hidden)
        expert, parts = Axis("expert", m.experts, key="model.moe.experts"), Axis("gate_and_up", 2 if m.gated else 1)
        inner = Axis("expert_inner", m.ffn_hidden, key="model.moe.ffn_hidden")
        if m.lora_rank is not None:
            # The factors without an inner size are whole on each etp rank, so that none is split (`check`).
            rank, inner = Axis("rank", m.lora_rank), Axis("base_inner", m.ffn_hidden)
            yield Weight("fc1_lora_a", (expert, hidden, parts, rank), narrowed=True)
            yield Weight("fc1_lora_b", (expert, parts, rank, inner), start=0.0, narrowed=True)
            yield Weight("fc2_lora_a", (expert, inner, rank), narrowed=True)
            yield Weight("fc2_lora_b", (expert, rank, hidden), start=0.0, narrowed=True)
            both = Axis("base_inner", parts.count * m.ffn_hidden)
            yield Weight("base.fc1.weight", (both, hidden), frozen=True, unit="base.fc1")
            yield Weight("base.fc2.weight", (hidden, inner), frozen=True, unit="base.fc2")
            return
        yield Weight("fc1", (expert, hidden, parts, inner))
        yield Weight("fc2", (expert, inner, hidden))
        if m.bias:
            yield Weight("fc1_bias", (expert, parts, inner), "bias")
            yield Weight("fc2_bias", (expert, Axis("expert_output", self.hidden, key="model.hidden")), "bias")

    def multiply_adds(self, weight: Weight, seq_len: int) -> float:
        """Those of what the gate chooses, and all of what every token passes."""
        chosen = weight.routed or (weight.router and weight.name.startswith("gate."))
        return self.gate.multiply_adds(weight, seq_len) if chosen else 1.0

    def active(self, weight: Weight) -> float:
        """The chosen experts' share of the routed ones."""
        return self.gate.active if weight.routed else 1.0

    def flops(self, seq_len: int) -> float:
        """Those of the gate."""
        return self.gate.flops(self.hidden)

    reads = writes = False

    def apart(self) -> Iterator[Part]:
        """Shared experts."""
        if self.shared is not None:
            yield self.shared

    def exchanges(self, run: Any, tokens: int, sequences: int) -> Iterator[Exchange]:
        """Those of the gate, and of the mix's loss."""
        yield from self.gate.exchanges(tokens, sequences)
        if self.m.shared_experts and self.m.shared_mix == "cmr" and self.m.cmr_coefficient:
            yield Exchange("all_reduce", 4)  # of passes without gradients, too

    def kept(self, run: Any, shape: Any) -> Iterator[Kept]:
        """The products of fc1 of each row; where rows travel, also what arrived; scores; shared experts."""
        m, gate = self.m, self.gate
        parts = 2 if m.gated else 1
        row = float(parts * m.ffn_hidden)
        if m.lora_rank is not None:
            # Also the rows, what the second product takes, and both products of low rank.
            row += self.hidden + m.ffn_hidden + (parts + 1) * m.lora_rank
        rows = gate.mean_choices * row + shape.arrived_rows * self.hidden
        rows *= gate.rows_per_token(run.train.seq_len)
        yield Kept(rows, "tokens", selective=True)
        if m.bias and gate.weighted:
            yield Kept(gate.mean_choices * self.hidden, "tokens")  # each row's output bias, before it is weighed
        if m.constant_experts:
            # They multiply in float32, and add up to one row.
            yield Kept(self.hidden, "tokens", shape.width < 4, selective=True, width=4)
        yield from gate.kept(self.hidden, shape)
        yield Kept(self.hidden, "tokens", selective=True)  # the tokens
        yield from self._after_experts(run, shape)
        if self.shared is not None:
            # The outputs of the branches that a mix has factors for.
            yield Kept(MIX_BRANCHES[m.shared_mix] * self.hidden, "tokens")
            yield from self.shared.kept(run, shape)
            if shape.degrees.tp > 1:
                yield Kept(self.hidden, "whole", selective=True)  # the tokens of all slices
                yield Kept(self.hidden, "tokens", plain=False, selective=True)  # this slice's sums

    def _after_experts(self, run: Any, shape: Any) -> Iterator[Kept]:
        """What selective recomputation keeps for what follows the experts: their sums, and the stream beside the layer.

        With experts apart that is a part of its own (`Block.finish`). Of such a part nothing is kept unless backward
        needs any of it, and a sum alone needs none.
        """
        d, m = shape.degrees, self.m
        multiplied = MIX_BRANCHES[m.shared_mix] + m.copy_experts + m.constant_experts
        if multiplied or not experts_apart(shape):
            yield Kept(self.hidden, "tokens", plain=False, selective=True)
            yield Kept(self.hidden, "stream", plain=False, selective=True)
            if d.tp > 1 and not run.parallel.sp:
                yield Kept(self.hidden, "whole", plain=False, selective=True)  # all slices, for the stream

    def products(self) -> Iterator[Kept]:
        """Those of shared experts."""
        if self.shared is not None:
            yield from self.shared.products()

    def results(self, shape: Any) -> Iterator[Kept]:
        """Those of shared experts, and the experts' rows; without rows that travel, all branches have one gradient."""
        yield from self.products()
        if shape.arrived_rows:
            yield Kept(
                shape.arrived_rows * self.gate.rows_per_token(shape.config.train.seq_len) * self.hidden, "tokens"
            )
        elif self.shared is None or MIX_BRANCHES[self.m.shared_mix]:
            yield Kept(self.hidden, "tokens")

    def check(self) -> list[Problem]:
        """Rules of the gate, its losses, capacity and experts that are broken."""
        return gate_rules.check(self.m) + expert_rules.check(self.m, self.hidden)

    def build(self) -> nn.Module:
        """The module."""
        from moesys.models.moe import build_moe

        return build_moe(self.m, self.hidden, self.layer)


def _router(weight: Weight, prefix: str) -> Weight:
    """A weight of a gate or of a mix, with float32 arithmetic."""
    return replace(weight, name=prefix + weight.name, router=True)
