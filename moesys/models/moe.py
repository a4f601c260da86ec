"""The MoE layer that a configuration describes."""

from __future__ import annotations

from moesys.config.schema import MoEConfig
from moesys.models.layers import FeedForward
from moesys.moe import MoELayer
from moesys.moe.experts import Experts
from moesys.moe.gates import Gate, TopKGate


def build_moe(m: MoEConfig, hidden: int, layer: int) -> MoELayer:
    """The MoE layer of block `layer`; its number makes random routing differ between layers."""
    shared = FeedForward(hidden, m.shared_width) if m.shared_experts else None
    experts = Experts(m.experts, hidden, m.ffn_hidden, m.activation, m.bias)
    return MoELayer(build_gate(m, hidden, layer), experts, shared)


def build_gate(m: MoEConfig, hidden: int, layer: int) -> Gate:
    """The gate of block `layer`."""
    return TopKGate(
        hidden,
        m.experts,
        m.top_k,
        normalize=m.normalize,
        scale=m.scale,
        capacity_factor=m.capacity_factor,
        drop=m.drop,
        balance_loss=m.balance_loss,
        z_loss=m.z_loss,
    )
