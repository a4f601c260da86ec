"""Moving tokens to experts and results back, on one device: a permutation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesys.moe.routing import Routing

ExpertsFunction = Callable[[Tensor, Tensor], Tensor]
"""(rows [N, H] sorted by expert, tokens_per_expert [E_local]) → outputs [N, H]."""


class Dispatcher:
    """Sorts tokens by expert, runs the experts, and forms each token's weighted sum.

    Expert parallelism swaps in a subclass that sends the sorted rows to the devices of their experts;
    nothing else in the layer changes.
    """

    def __init__(self, experts: int):
        self.experts = experts

    def __call__(self, x_TH: Tensor, routing: Routing, experts: ExpertsFunction) -> Tensor:
        """Σ over a token's assignments of weight · expert(x): [T, H] in the type of x."""
        by_expert = routing.expert_A.argsort(stable=True)
        token_A, weight_A = routing.token_A[by_expert], routing.weight_A[by_expert]
        counts_E = torch.bincount(routing.expert_A, minlength=self.experts)
        rows = self.run(x_TH.index_select(0, token_A), counts_E, experts)
        weighted = rows * weight_A.to(rows.dtype).unsqueeze(-1)
        return torch.zeros_like(x_TH).index_add(0, token_A, weighted)

    def run(self, rows_AH: Tensor, counts_E: Tensor, experts: ExpertsFunction) -> Tensor:
        """Outputs of the experts for rows [A, H] sorted by expert, `counts_E` int64 [E] of them each."""
        return experts(rows_AH, counts_E)
