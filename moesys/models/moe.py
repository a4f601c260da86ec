"""The MoE layer that a configuration describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from moesys.models import gates
from moesys.models.layers import FeedForward
from moesys.moe import MoELayer
from moesys.moe.capacity import Capacity
from moesys.moe.experts import Experts
from moesys.moe.gates import Gate, PrototypeGate, TopKGate
from moesys.moe.gates.cosine import CosineProjection
from moesys.moe.gates.projection import GateProjection
from moesys.moe.gates.top_k import Groups, Randomness
from moesys.moe.lora import LoRAExperts
from moesys.moe.losses import Balance
from moesys.moe.shared import build_mix
from moesys.moe.zero import ZeroExperts, ZeroRule

if TYPE_CHECKING:
    from moesys.config.schema import MoEConfig


def build_moe(m: MoEConfig, hidden: int, layer: int) -> MoELayer:
    """The MoE layer of block `layer`; its number makes random routing differ between layers."""
    shared = FeedForward(hidden, m.shared_width, m.activation) if m.shared_experts else None
    experts = build_experts(m, hidden)
    computed = m.copy_experts + m.constant_experts
    zero = ZeroExperts(hidden, m.zero_experts, m.copy_experts, m.constant_experts) if computed else None
    mix = build_mix(m.shared_mix, hidden, m.cmr_budget, m.cmr_loss)
    return MoELayer(build_gate(m, hidden, layer), experts, shared, zero, mix)


def build_experts(m: MoEConfig, hidden: int) -> Experts | LoRAExperts:
    """The routed experts."""
    if m.lora_rank is not None:
        return LoRAExperts(m.experts, hidden, m.ffn_hidden, m.lora_rank, m.lora_alpha, m.activation)
    return Experts(m.experts, hidden, m.ffn_hidden, m.activation, m.bias)


def build_gate(m: MoEConfig, hidden: int, layer: int) -> Gate:
    """The gate of block `layer`."""
    gate = gates.BUILDERS.get(m.gate.kind, _token_choice)(m, hidden, layer)
    gate.forced = gates.forced(m, layer)
    return gate


def _token_choice(m: MoEConfig, hidden: int, layer: int) -> Gate:
    g = m.gate
    zero = _zero_rule(m)
    candidates = m.experts + m.zero_computation
    if g.kind == "cosine":
        projection: nn.Module = CosineProjection(hidden, candidates, g.dim or max(2, candidates // 2))
    else:
        projection = GateProjection(hidden, candidates, g.bias)
    return (PrototypeGate if g.kind == "prototype" else TopKGate)(
        hidden,
        m.experts,
        m.top_k,
        score=g.score,
        normalize=m.normalize,
        scale=m.scale,
        bias_rate=m.bias_rate,
        groups=Groups(g.groups, g.groups_kept, g.group_score) if g.groups > 1 else None,
        randomness=Randomness(g.noise == "gaussian", g.jitter, g.second == "random", layer),
        capacity=Capacity(m.capacity_factor, m.eval_capacity_factor, m.min_capacity, m.drop, m.pad_to_capacity),
        balance=_balance(m),
        counts=m.balance_counts,
        zero=zero,
        projection=projection,
    )


def _balance(m: MoEConfig) -> Balance:
    return Balance(
        m.balance_loss, m.sequence_balance_loss, m.global_balance_loss, m.z_loss, m.importance_loss, m.load_loss
    )


def _zero_rule(m: MoEConfig) -> ZeroRule | None:
    if not m.zero_computation:
        return None
    return ZeroRule(m.experts, m.zero_computation, m.zero_variant, m.zero_tau)
