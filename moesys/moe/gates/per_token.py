"""What gates share that send every token to the same number of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesys.moe.counts import occurrences
from moesys.moe.routing import Routing, Tokens

Choice = Callable[[Tokens], Tensor]
"""Experts [T, k], int64 and distinct in a row, from what is known of tokens beside their vectors."""


def route(expert_Tk: Tensor, weight_Tk: Tensor, experts: int, real_T: Tensor | None = None) -> Routing:
    """Every token to its row of `expert_Tk` (int64), with the weights (float32) of the same place.

    Those that are not real, if `real_T` bool [T] says so, go nowhere.
    """
    tokens, top_k = expert_Tk.shape
    token_A = torch.arange(tokens, device=expert_Tk.device).repeat_interleave(top_k)
    expert_A, weight_A = expert_Tk.flatten(), weight_Tk.flatten()
    if real_T is not None:
        kept_A = real_T[token_A].nonzero().squeeze(1)
        token_A, expert_A, weight_A = token_A[kept_A], expert_A[kept_A], weight_A[kept_A]
    return Routing(token_A, expert_A, weight_A, load_E=occurrences(expert_A, experts))


def route_evenly(expert_Tk: Tensor, experts: int, real_T: Tensor | None = None) -> Routing:
    """`route` with weights 1/k."""
    top_k = expert_Tk.shape[1]
    weight_Tk = expert_Tk.new_full((), 1 / top_k, dtype=torch.float32).expand(expert_Tk.shape)
    return route(expert_Tk, weight_Tk, experts, real_T)
