"""The MoE layer that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from moesys.models.layers import FeedForward
from moesys.models.parts.gates.kind import describe
from moesys.moe import MoELayer, noise
from moesys.moe.experts import Experts
from moesys.moe.gates import Gate
from moesys.moe.gates.forced import Balanced, Skewed
from moesys.moe.lora import LoRAExperts
from moesys.moe.routing import Tokens
from moesys.moe.shared import build_mix
from moesys.moe.zero import ZeroExperts

if TYPE_CHECKING:
    from moesys.config.schema import MoEConfig


def build_moe(m: MoEConfig, hidden: int, layer: int) -> MoELayer:
    """The MoE layer of block `layer`; its number makes random routing differ between layers."""
    shared = FeedForward(hidden, m.shared_width, m.activation) if m.shared_experts else None
    computed = m.copy_experts + m.constant_experts
    zero = ZeroExperts(hidden, m.zero_experts, m.copy_experts, m.constant_experts) if computed else None
    mix = build_mix(m.shared_mix, hidden, m.cmr_budget, m.cmr_loss)
    return MoELayer(build_gate(m, hidden, layer), build_experts(m, hidden), shared, zero, mix)


def build_experts(m: MoEConfig, hidden: int) -> Experts | LoRAExperts:
    """The routed experts."""
    if m.lora_rank is not None:
        return LoRAExperts(m.experts, hidden, m.ffn_hidden, m.lora_rank, m.lora_alpha, m.activation)
    return Experts(m.experts, hidden, m.ffn_hidden, m.activation, m.bias)


def build_gate(m: MoEConfig, hidden: int, layer: int) -> Gate:
    """The gate of block `layer`, with what chooses in its place by force."""
    gate = describe(m).build(hidden, layer)
    gate.forced = forced(m, layer)
    return gate


def forced(m: MoEConfig, layer: int) -> Callable[[Tokens], Tensor] | None:
    """What chooses in the gate's place; None if nothing does."""
    if m.gate.force == "balanced":
        return Balanced(m.experts, m.top_k)
    if m.gate.force == "skewed":
        return Skewed(m.experts, m.top_k, m.gate.skew, noise.key(layer, f"choice/{m.gate.seed}"))
    return None
