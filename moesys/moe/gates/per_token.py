"""Routing of every token to the same number of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesys.moe.counts import occurrences
from moesys.moe.routing import Routing, Tokens, only

Choice = Callable[[Tokens], Tensor]
"""Experts [T, k], int64 and distinct in a row, from the numbers and ids of tokens."""


def route(expert_Tk: Tensor, weight_Tk: Tensor, experts: int, real_T: Tensor | None = None) -> Routing:
    """The routing of every token to its row of `expert_Tk` (int64), with the weights (float32) of the same place.

    Tokens that are not `real_T` (bool [T]; None: all are) go nowhere.
    """
    tokens, top_k = expert_Tk.shape
    token_A = torch.arange(tokens, device=expert_Tk.device).repeat_interleave(top_k)
    keep_Tk = None if real_T is None else real_T[:, None].expand_as(expert_Tk)
    load_E = occurrences(expert_Tk, experts, keep_Tk)
    routing = Routing(token_A, expert_Tk.flatten(), weight_Tk.flatten(), load_E=load_E)
    return only(routing, None if keep_Tk is None else keep_Tk.flatten())


def route_evenly(expert_Tk: Tensor, experts: int, real_T: Tensor | None = None) -> Routing:
    """`route` with weights 1/k."""
    top_k = expert_Tk.shape[1]
    weight_Tk = expert_Tk.new_full((), 1 / top_k, dtype=torch.float32).expand(expert_Tk.shape)
    return route(expert_Tk, weight_Tk, experts, real_T)
