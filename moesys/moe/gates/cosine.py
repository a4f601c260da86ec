"""Logits that are cosines: the direction of a token decides, not its length."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

from moesys.moe.start import like_linear

START = log(0.3)
"""Initial logarithm of the temperature."""


class CosineProjection(nn.Module):
    """Logits `cos(W·x, e_i) / τ` in a low dimension (X-MoE, arXiv 2204.09179), in float32 or wider.

    Parameters: `down` W [D, H], `weight` the experts' e_i [E, D], `log_temperature` [1], learned. Matrices start as
    those of `nn.Linear` do.

    Args:
        hidden, experts: H, E.
        dim: D; the paper has E / 2.
    """

    def __init__(self, hidden: int, experts: int, dim: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(dim, hidden))
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.log_temperature = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give every parameter its initial values."""
        for matrix in (self.down, self.weight):
            like_linear(matrix, matrix.shape[1])
        nn.init.constant_(self.log_temperature, START)

    def forward(self, x_TH: Tensor) -> Tensor:
        """Logits [T, E], each between -1/τ and 1/τ."""
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        low_TD = nn.functional.linear(x_TH.to(wide), self.down.to(wide))
        expert_ED = nn.functional.normalize(self.weight.to(wide), dim=-1)
        cosine_TE = nn.functional.linear(nn.functional.normalize(low_TD, dim=-1), expert_ED)
        return cosine_TE * torch.exp(-self.log_temperature.to(wide))
