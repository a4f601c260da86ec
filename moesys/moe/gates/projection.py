"""From tokens x [T, H] to logits [T, E], in float32 or wider whatever the model's precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GateProjection(nn.Linear):
    """`x · Wᵀ`, plus a learned bias [E] if there is one (GPT-OSS)."""

    def __init__(self, hidden: int, experts: int, bias: bool = False):
        super().__init__(hidden, experts, bias=bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return nn.functional.linear(x_TH.to(wide), self.weight.to(wide), bias)
