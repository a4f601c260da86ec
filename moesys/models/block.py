"""One decoder block, dense or MoE."""

from __future__ import annotations

from torch import Tensor, nn

from moesys.config.schema import ModelConfig, MoEConfig
from moesys.models.attention import GroupedQueryAttention, LatentAttention
from moesys.models.layers import FeedForward, RMSNorm
from moesys.moe import MoELayer
from moesys.moe.experts import Experts
from moesys.moe.gates import TopKGate


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`: [B, S, H] → [B, S, H]."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        kinds = {"gqa": GroupedQueryAttention, "mla": LatentAttention}
        self.attention = kinds[config.attention.kind](config)
        self.ffn_norm = RMSNorm(config.hidden, config.norm_eps)
        if config.moe is not None and config.is_moe(layer):
            self.ffn: nn.Module = build_moe(config.moe, config.hidden)
        else:
            assert config.ffn_hidden is not None
            self.ffn = FeedForward(config.hidden, config.ffn_hidden)

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), cos, sin)
        return x_BSH + self.ffn(self.ffn_norm(x_BSH))


def build_moe(m: MoEConfig, hidden: int) -> MoELayer:
    """The MoE layer that a configuration describes."""
    gate = TopKGate(
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
    shared = FeedForward(hidden, m.shared_width) if m.shared_experts else None
    return MoELayer(gate, Experts(m.experts, hidden, m.ffn_hidden), shared)
