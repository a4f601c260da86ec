"""Forced routing, for benchmarks of a layer under a known load."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.moe import noise
from moesys.moe.routing import Tokens


class Balanced:
    """Round robin: token n of the run to experts n·k, n·k + 1, …, n·k + k − 1 (mod E).

    Args:
        experts, top_k: E and k.
    """

    def __init__(self, experts: int, top_k: int):
        self.experts, self.top_k = experts, top_k

    def __call__(self, tokens: Tokens) -> Tensor:
        choice = torch.arange(self.top_k, device=tokens.number_T.device)
        return (tokens.number_T[:, None] * self.top_k + choice) % self.experts


class Skewed:
    """k distinct experts, drawn one after another with chances ∝ 1 / (e + 1)^skew (Zipf's law).

    Expert 0 is the most popular. By the tokens' numbers, so that every run and layout sees the same.

    Args:
        experts, top_k: E and k.
        skew: Zipf's exponent; 0 is uniform.
        key: of the random numbers (`moesys.moe.noise.key`).
    """

    def __init__(self, experts: int, top_k: int, skew: float, key: int):
        self.experts, self.top_k, self.skew, self.key = experts, top_k, skew, key

    def __call__(self, tokens: Tokens) -> Tensor:
        # The k largest of log(chance) + Gumbel noise are a draw without replacement (arXiv 1903.06059).
        rank_E = torch.arange(1, self.experts + 1, device=tokens.number_T.device, dtype=torch.float32)
        drawn_TE = noise.uniform(tokens.number_T, self.experts, self.key)
        return (-(-drawn_TE.log()).log() - self.skew * rank_E.log()).topk(self.top_k).indices
