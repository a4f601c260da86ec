"""Zero-computation experts: they stand among the others in the gate, and cost (almost) nothing.

T tokens, E true experts, numbered first, then Z others: those that give zero, that copy, and constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ZeroRule:
    """The rule of a gate for its `count` zero-computation experts beside the `true` ones.

    "moe++" (arXiv 2410.07348): they share in a token's normalised weights, and count by `tau` in the
    load-balancing losses; a true expert's capacity is γ·τ·T·k / (τ·E + Z). "adamoe" (arXiv 2406.13233,
    its null experts): the chosen true experts' weights alone are normalised, and the balancing losses take
    the mean load for each of the others', so that they need not be balanced among themselves. None of the
    others has a capacity.
    """

    true: int
    count: int
    variant: Literal["moe++", "adamoe"] = "moe++"
    tau: float = 1.0

    @property
    def places(self) -> float:
        """The number of experts that a capacity divides tokens by."""
        return self.true + self.count / self.tau

    def adjust(self, f: Tensor) -> Tensor:
        """The loads f [..., E + Z] as the balancing losses count them."""
        true, rest = f[..., : self.true], f[..., self.true :]
        rest = rest.mean(-1, keepdim=True).expand_as(rest) if self.variant == "adamoe" else rest * self.tau
        return torch.cat([true, rest], -1)

    def weigh(self, weight_Tk: Tensor, expert_Tk: Tensor, scale: float) -> Tensor:
        """AdaMoE's weights: of the true experts among the chosen, normalised by their sum alone."""
        true_Tk = weight_Tk * (expert_Tk < self.true)
        return true_Tk / (true_Tk.sum(-1, keepdim=True) + 1e-20) * scale

    def weights(self, weight_Tk: Tensor, expert_Tk: Tensor) -> Tensor:
        """Each token's weights of the zero-computation experts: [T, Z]."""
        number_Tk = expert_Tk - self.true
        there_Tk = weight_Tk * (number_Tk >= 0)
        return weight_Tk.new_zeros(len(weight_Tk), self.count).scatter_add(1, number_Tk.clamp(min=0), there_Tk)


class ZeroExperts(nn.Module):
    """The sum of the outputs of a token's zero-computation experts, computed on the token's device (MoE++).

    A copy gives x; constant expert j gives α₀·x + α₁·v_j with (α₀, α₁) = softmax(x · W_jᵀ). Parameters: of
    `constant` the vectors v, [H, constants]; of `mix` the W_j, [2 · constants, H].

    Args:
        hidden: H.
        zeros, copies, constants: how many of each kind, in the order of their numbers.
    """

    def __init__(self, hidden: int, zeros: int, copies: int, constants: int):
        super().__init__()
        self.zeros, self.copies, self.constants = zeros, copies, constants
        if constants:
            self.mix = _Wide(hidden, 2 * constants, bias=False)
            self.constant = _Wide(constants, hidden, bias=False)

    def forward(self, x_TH: Tensor, weight_TZ: Tensor) -> Tensor:
        """[T, H] in the type of x, for the weights float32 [T, Z] of each token's experts."""
        _, copy_TC, constant_TC = weight_TZ.split([self.zeros, self.copies, self.constants], -1)
        share_T1 = copy_TC.sum(-1, keepdim=True)
        if not self.constants:
            return x_TH * share_T1.to(x_TH.dtype)
        alpha_TC2 = self.mix(x_TH).unflatten(-1, (self.constants, 2)).softmax(-1)
        share_T1 = share_T1 + (constant_TC * alpha_TC2[..., 0]).sum(-1, keepdim=True)
        return (x_TH * share_T1 + self.constant(constant_TC * alpha_TC2[..., 1])).to(x_TH.dtype)


class _Wide(nn.Linear):
    """A product in float32 or wider, whatever the types of the weight and of x."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        return nn.functional.linear(x.to(wide), self.weight.to(wide))
