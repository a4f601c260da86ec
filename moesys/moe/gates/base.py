"""BASE layers: balanced assignment of tokens to experts."""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from moesys.moe.counts import occurrences
from moesys.moe.gates.per_token import route
from moesys.moe.gates.scored import ScoredGate
from moesys.moe.routing import MicroBatch, Routing, Tokens

BITS = 12
"""Scores are compared as integers in steps of 2^−BITS: rounding differs between layouts of a run, and must not decide
between two equal tokens."""

LARGEST = 2**40
"""Largest score: sums of some of them stay far below `NEVER`."""

SWEEPS = 16
"""Steps towards the prices of experts. After more of them fewer tokens move one by one."""

NEVER = 2**60
"""The cost of an impossible move."""


class BaseGate(ScoredGate):
    """Each token to one expert, such that the sum of x · w is largest and no expert gets more than ⌈T / E⌉.

    The weight is sigmoid(x · w) of the chosen expert. Training assigns the tokens of a micro-batch
    together; evaluation gives each its best expert (Lewis et al. 2021, arXiv 2103.16716).
    """

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        logits_TE = self.projection(x_TH)
        if self.forced is not None:
            expert_T1 = self.forced(tokens)
        elif self.training:
            expert_T1 = self._assign(logits_TE.detach(), tokens.number_T, scope)[:, None]
        else:
            expert_T1 = logits_TE.argmax(-1, keepdim=True)
        routing = route(expert_T1, logits_TE.gather(1, expert_T1).sigmoid(), self.experts, tokens.real_T)
        return self.with_losses(routing, logits_TE, scope)

    def _assign(self, logits_TE: Tensor, number_T: Tensor, scope: MicroBatch) -> Tensor:
        order = scope.gather(number_T).argsort()
        score_TE = (scope.gather(logits_TE)[order] * 2**BITS).nan_to_num().clamp(-LARGEST, LARGEST)
        ranked = balanced_assignment(score_TE.round().long())
        return torch.empty_like(ranked).scatter_(0, order, ranked)[scope.mine(len(logits_TE))]


# One operation: it reads a result from the device after every step, so that no graph spans it.
@torch.library.custom_op("moesys::balanced_assignment", mutates_args=())
def balanced_assignment(score_TE: Tensor) -> Tensor:
    """Experts int64 [T] that maximise the sum of `score_TE` (int64), at most ⌈T / E⌉ tokens each: exactly.

    Experts get prices at which about as many tokens prefer each of them. That choice is the best one for
    the loads that it has; then tokens move from experts with too many to those with too few, always along
    the cheapest way, which keeps it the best (successive shortest paths: Ahuja, Magnanti and Orlin 1993,
    section 9.7). So it ends after T moves at most, usually after a handful.
    """
    tokens, experts = score_TE.shape
    places = ceil(tokens / experts)
    if experts == 1:
        return score_TE.new_zeros(tokens)
    # Tokens of score 0 for every expert fill the last places.
    score_NE = torch.nn.functional.pad(score_TE, (0, 0, 0, experts * places - tokens))
    owner_N = (score_NE - _prices(score_NE, places)).argmax(1)
    while bool(((spare_E := places - occurrences(owner_N, experts)) < 0).any()):
        loss_NE = score_NE.gather(1, owner_N[:, None]) - score_NE
        _move(owner_N, loss_NE, spare_E)
    return owner_N[:tokens].clone()


@balanced_assignment.register_fake
def _(score_TE: Tensor) -> Tensor:
    return score_TE.new_empty(score_TE.shape[0], dtype=torch.int64)


def _prices(score_NE: Tensor, places: int) -> Tensor:
    """Prices int64 [E] at which about `places` tokens prefer each expert, by damped fixed-point steps."""
    expert_E = torch.arange(score_NE.shape[1], device=score_NE.device)
    price_E = torch.zeros_like(score_NE[0])
    for _ in range(SWEEPS):
        best = (score_NE - price_E).topk(2, dim=1)
        other_NE = torch.where(expert_E == best.indices[:, :1], best.values[:, 1:], best.values[:, :1])
        # The most that each token would pay; an expert takes the `places` highest offers.
        offer = (score_NE - other_NE).topk(places + 1, dim=0).values
        price_E = (price_E + (offer[-2] + offer[-1]) // 2) // 2
    return price_E


def _move(owner_N: Tensor, loss_NE: Tensor, spare_E: Tensor) -> None:
    """Change owners along one cheapest way from experts with `spare_E` < 0 to one with places to spare."""
    experts = len(spare_E)
    # Cost of moving one token from an expert (row) to another (column), where it has tokens.
    cost_EE = loss_NE.new_full((experts, experts), NEVER)
    cost_EE.scatter_reduce_(0, owner_N[:, None].expand(loss_NE.shape), loss_NE, "amin")
    way = _cheapest_way(cost_EE, spare_E)
    # As many tokens at once as cost the same.
    able = [(owner_N == a) & (loss_NE[:, b] == cost_EE[a, b]) for a, b in pairwise(way)]
    count = min(int(-spare_E[way[0]]), int(spare_E[way[-1]]), *(int(tokens.sum()) for tokens in able))
    for tokens, expert in zip(able, way[1:], strict=True):
        owner_N[tokens.nonzero()[:count, 0]] = expert


def _cheapest_way(cost_EE: Tensor, spare_E: Tensor) -> list[int]:
    """Experts of a cheapest way, by Bellman's and Ford's algorithm (costs may be negative, cycles are not)."""
    far_E = torch.where(spare_E < 0, 0, NEVER)
    before_E = torch.full_like(spare_E, -1)
    for _ in range(len(spare_E)):
        reached = (far_E[:, None] + cost_EE).min(0)
        shorter_E = reached.values < far_E
        far_E = torch.where(shorter_E, reached.values, far_E)
        before_E = torch.where(shorter_E, reached.indices, before_E)
    before = before_E.tolist()
    way = [int(torch.where(spare_E > 0, far_E, 2 * NEVER).argmin())]
    while before[way[-1]] >= 0:
        way.append(before[way[-1]])
    return way[::-1]
