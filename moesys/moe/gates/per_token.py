"""What gates share that send every token to the same number of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesys.moe.routing import Routing, Tokens, only

Choice = Callable[[Tokens], Tensor]
"""Experts [T, k], int64 and distinct in a row, from what is known of tokens beside their vectors."""


def route(expert_Tk: Tensor, weight_Tk: Tensor, experts: int, real_T: Tensor | None = None) -> Routing:
    """Every token to its row of `expert_Tk` (int64), with the weights (float32) of the same place.

    Those that are not real, if `real_T` bool [T] says so, go nowhere.
    """
    tokens, top_k = expert_Tk.shape
    token_A = torch.arange(tokens, device=expert_Tk.device).repeat_interleave(top_k)
    keep_Tk = None if real_T is None else real_T[:, None].expand_as(expert_Tk)
    load_E = load_of(expert_Tk, experts, keep_Tk)
    routing = Routing(token_A, expert_Tk.flatten(), weight_Tk.flatten(), load_E=load_E)
    return only(routing, None if keep_Tk is None else keep_Tk.flatten())


def load_of(expert_Tk: Tensor, experts: int, stays_Tk: Tensor | None = None) -> Tensor:
    """How often each expert occurs in `expert_Tk`, where it stays: int64 [E]. Nothing waits for the device."""
    one_A = torch.ones_like(expert_Tk).flatten() if stays_Tk is None else stays_Tk.flatten().to(torch.int64)
    return expert_Tk.new_zeros(experts).scatter_add_(0, expert_Tk.flatten(), one_A)


def route_evenly(expert_Tk: Tensor, experts: int, real_T: Tensor | None = None) -> Routing:
    """`route` with weights 1/k."""
    top_k = expert_Tk.shape[1]
    weight_Tk = expert_Tk.new_full((), 1 / top_k, dtype=torch.float32).expand(expert_Tk.shape)
    return route(expert_Tk, weight_Tk, experts, real_T)
