"""Experts that are low-rank changes of one frozen dense feed-forward.

N rows, T tokens, E experts, H hidden, F inner size, G = 2 (gate and linear part) or 1, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.kernels.activation import KINDS, activate
from moesys.kernels.grouped_matmul import grouped_matmul
from moesys.kernels.linear import linear
from moesys.kernels.permute import Permutation, permute, unpermute
from moesys.moe.experts import local
from moesys.moe.start import like_linear


class Frozen(nn.Linear):
    """A frozen linear map, computed in the type of its input."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """The map of x [..., inputs]: [..., outputs]."""
        return linear(x, self.weight)


class LoRAExperts(nn.Module):
    """Expert e is the dense feed-forward with `W + alpha / r · A_e · B_e` in place of each of its matrices.

    MoLoRA (arXiv 2309.05444), LoRAMoE (arXiv 2312.09979). The dense matrices belong to all experts and
    are frozen: `base.fc1` [G · F, H] (all gates, then all linear parts) and `base.fc2` [H, F]. A and B are
    trained: fc1_lora_a [E, H, G, r] and fc1_lora_b [E, G, r, F], fc2_lora_a [E, F, r] and fc2_lora_b
    [E, r, H]. A starts as `nn.Linear`'s weights and B as zeros, so that every expert starts as the dense feed-forward.

    W + A · B is never formed. The dense product is computed once per token on one device, and once per row where rows
    come from other devices.

    Args:
        experts, hidden, ffn_hidden, rank: E, H, F, r.
        alpha: numerator of the factor on the changes; None: r, a factor of 1.
        activation: a kind of `moesys.kernels.activation`.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        ffn_hidden: int,
        rank: int,
        alpha: float | None = None,
        activation: str = "swiglu",
    ):
        super().__init__()
        parts = KINDS[activation].parts
        self.activation, self.scale = activation, 1.0 if alpha is None else alpha / rank
        self.base = nn.ModuleDict({"fc1": Frozen(hidden, parts * ffn_hidden), "fc2": Frozen(ffn_hidden, hidden)})
        self.fc1_lora_a = nn.Parameter(torch.empty(experts, hidden, parts, rank))
        self.fc1_lora_b = nn.Parameter(torch.empty(experts, parts, rank, ffn_hidden))
        self.fc2_lora_a = nn.Parameter(torch.empty(experts, ffn_hidden, rank))
        self.fc2_lora_b = nn.Parameter(torch.empty(experts, rank, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give A and B their initial values."""
        for a in (self.fc1_lora_a, self.fc2_lora_a):
            like_linear(a, a.shape[1])
        for b in (self.fc1_lora_b, self.fc2_lora_b):
            nn.init.zeros_(b)

    def forward(
        self,
        x_NH: Tensor,
        tokens_per_expert: Tensor,
        weight_N: Tensor | None = None,
        p: Permutation | None = None,
    ) -> Tensor:
        """Outputs as those of `Experts.forward`, without `share_GE`."""
        rows_NH = x_NH if p is None else permute(x_NH, p)
        dense = self.base["fc1"](x_NH)
        dense = dense if p is None else permute(dense, p)
        change_NGF = self._change1(rows_NH, tokens_per_expert)
        h_NGF = torch.add(dense.view_as(change_NGF), change_NGF, alpha=self.scale)
        inner_NF = activate(h_NGF, self.activation, weight_N)
        change_NH = self._change2(inner_NF, tokens_per_expert)
        if p is not None:
            # The second product is linear: sums over a token's rows may come first.
            inner_NF, change_NH = unpermute(inner_NF, p), unpermute(change_NH, p)
        return torch.add(self.base["fc2"](inner_NF), change_NH, alpha=self.scale)

    def _change1(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        """x · A · B of the first product: [N, G, F]."""
        a, b = (local(w).to(x_NH.dtype) for w in (self.fc1_lora_a, self.fc1_lora_b))
        low_NGr = grouped_matmul(x_NH, a.flatten(2), counts_E).unflatten(1, a.shape[2:])
        pairs = zip(low_NGr.unbind(1), b.unbind(1), strict=True)
        return torch.stack([grouped_matmul(x.contiguous(), w.contiguous(), counts_E) for x, w in pairs], 1)

    def _change2(self, inner_NF: Tensor, counts_E: Tensor) -> Tensor:
        """inner · A · B of the second product: [N, H]."""
        a, b = (local(w).to(inner_NF.dtype) for w in (self.fc2_lora_a, self.fc2_lora_b))
        return grouped_matmul(grouped_matmul(inner_NF, a, counts_E), b, counts_E)
