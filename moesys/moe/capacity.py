"""Capacity: how many tokens of a micro-batch one expert takes, and which assignments are dropped."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from moesys.moe.routing import MicroBatch


def capacity(factor: float, tokens: int, top_k: int, experts: int) -> int:
    """`ceil(factor · T · k / E)` tokens per expert (GShard, arXiv 2006.16668)."""
    return ceil(factor * tokens * top_k / experts)


def kept(expert_A: Tensor, weight_A: Tensor, order_A: Tensor, limit: int, policy: str, scope: MicroBatch) -> Tensor:
    """Which of this device's assignments fit into their expert: bool [A].

    Decided over the whole micro-batch, wherever its tokens lie. `order_A` (int64, unique over the
    micro-batch) is an assignment's place in it. With policy "weight" an expert keeps its `limit`
    assignments of largest weight, ties to the earliest; with "position" the `limit` earliest.

    Weights are compared to 12 bits: tokens that are alike (a run of spaces) differ by rounding alone,
    and which of them stays must not depend on the layout of the run.
    """
    local = expert_A.shape[0]
    expert, order = scope.gather(expert_A), scope.gather(order_A)
    ranked = order.argsort()
    if policy == "weight":
        weight = _rounded(scope.gather(weight_A.detach()))
        ranked = ranked[weight[ranked].argsort(descending=True, stable=True)]
    ranked = ranked[expert[ranked].argsort(stable=True)]
    sorted_expert = expert[ranked]
    first = torch.searchsorted(sorted_expert, sorted_expert)
    place = torch.arange(len(expert), device=expert.device) - first
    keep = torch.empty(len(expert), dtype=torch.bool, device=expert.device)
    keep[ranked] = place < limit
    return keep[scope.mine(local)]


def _rounded(weight: Tensor) -> Tensor:
    """Weights to 12 significant bits."""
    mantissa, exponent = torch.frexp(weight)
    return torch.ldexp((mantissa * 4096).round(), exponent)
