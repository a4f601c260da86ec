"""One decoder block, dense or MoE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from moesys.models.attention import GroupedQueryAttention, LatentAttention
from moesys.models.layers import FeedForward, RMSNorm
from moesys.models.moe import build_moe
from moesys.moe import MoELayer

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`: [B, S, H] → [B, S, H]."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        kinds = {"gqa": GroupedQueryAttention, "mla": LatentAttention}
        self.attention = kinds[config.attention.kind](config)
        self.ffn_norm = RMSNorm(config.hidden, config.norm_eps)
        if config.moe is not None and config.is_moe(layer):
            self.ffn: nn.Module = build_moe(config.moe, config.hidden, layer)
        else:
            assert config.ffn_hidden is not None
            self.ffn = FeedForward(config.hidden, config.ffn_hidden)

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor, tokens_BS2: Tensor | None = None) -> Tensor:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), cos, sin)
        h_BSH = self.ffn_norm(x_BSH)
        return x_BSH + (self.ffn(h_BSH, tokens_BS2) if isinstance(self.ffn, MoELayer) else self.ffn(h_BSH))
