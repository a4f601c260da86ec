"""Capacity: the most tokens of a micro-batch that one expert takes, and the choice of assignments to drop.

T tokens of this device, E experts, k choices per token, A = T·k assignments, C the capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from moesys.moe.routing import MicroBatch, Routing, only

Drop = Literal["weight", "position", "choice", "priority"]


def capacity(factor: float, tokens: int, top_k: int, experts: float) -> int:
    """`ceil(factor · T · k / E)` tokens per expert (GShard, arXiv 2006.16668)."""
    # A hair less: in binary 1.1 · 100 / 10 is more than 11.
    return ceil(factor * tokens * top_k / experts * (1 - 1e-12))


@dataclass(frozen=True)
class Capacity:
    """The most tokens of a micro-batch that one expert takes, and the rule for dropping the others.

    Attributes:
        factor: see `capacity`; None routes every token (dropless).
        eval_factor: the same in evaluation; None for `factor`.
        minimum: least tokens per expert.
        drop: the assignments that a full expert drops. "weight": the lowest weights; "position": the latest tokens;
            "choice": last choices before first ones, then the latest (GShard, Switch); "priority": last
            choices before first ones, then tokens whose best score is lowest (V-MoE, arXiv 2106.05974).
        pad: give every expert exactly C rows of each device, fillers of weight 0 among them, such that no
            shape depends on the data.
        exact: compare weights by every bit; otherwise as `rounded`.
    """

    factor: float | None = None
    eval_factor: float | None = None
    minimum: int = 0
    drop: Drop = "weight"
    pad: bool = False
    exact: bool = False

    def _factor(self, training: bool) -> float | None:
        return self.factor if training or self.eval_factor is None else self.eval_factor

    def unlimited(self, training: bool) -> bool:
        """Whether experts take all tokens (dropless)."""
        return self._factor(training) is None

    def limit(self, training: bool, tokens: int, top_k: int, experts: float) -> int | None:
        """C of a micro-batch of `tokens`, at most all of them; None for no limit."""
        factor = self._factor(training)
        if factor is None:
            return None
        return min(max(capacity(factor, tokens, top_k, experts), self.minimum), tokens)


@dataclass(frozen=True)
class TopKChoice:
    """The top-k choice of tokens: `expert_Tk` int64, different ones per token, first choices first; `weight_Tk`.

    The best of a token's `scores_TE` is its priority. Choices that are not `wanted_Tk` (bool; None: all are) are no
    assignments, and take no capacity.
    """

    expert_Tk: Tensor
    weight_Tk: Tensor
    scores_TE: Tensor
    wanted_Tk: Tensor | None = None


def assign(
    choice: TopKChoice,
    number_T: Tensor,
    experts: int,
    limit: int | None,
    rule: Capacity,
    scope: MicroBatch,
    rows: int | None = None,
) -> Routing:
    """The assignments that fit, at most `limit` of the micro-batch per expert; the others are counted as dropped.

    Where `rule` pads, every expert gets `rows` of this device, `limit` by default, and at most all tokens.
    """
    tokens, top_k = choice.expert_Tk.shape
    token_A = torch.arange(tokens * top_k, device=number_T.device) // top_k
    routing = Routing(token_A, choice.expert_Tk.flatten(), choice.weight_Tk.flatten())
    keep_A = None if choice.wanted_Tk is None else choice.wanted_Tk.flatten()
    if limit is not None:
        wanted_A = torch.ones_like(token_A, dtype=torch.bool) if keep_A is None else keep_A
        keep_A = _fitting(choice, wanted_A, number_T, experts, limit, rule, scope)
        routing.dropped = wanted_A.sum() - keep_A.sum()
    if keep_A is not None and limit is not None and rule.pad:
        return _padded(routing, keep_A, tokens, experts, min(limit if rows is None else rows, tokens))
    return only(routing, keep_A)


def _fitting(
    choice: TopKChoice, wanted_A: Tensor, number_T: Tensor, experts: int, limit: int, rule: Capacity, scope: MicroBatch
) -> Tensor:
    """Whether each of this device's assignments fits into its expert: bool [A].

    The whole micro-batch counts, wherever its tokens lie.
    """
    tokens, top_k = choice.expert_Tk.shape
    choice_A = torch.arange(top_k, device=number_T.device).repeat(tokens)
    # The last of `keys` counts most; each is unique to a place in the micro-batch, not in this device's part.
    keys = [number_T.repeat_interleave(top_k) * top_k + choice_A]
    drop, compared = rule.drop, (lambda weight: weight) if rule.exact else rounded
    if drop == "weight":
        keys.append(-compared(choice.weight_Tk.detach().flatten()))
    elif drop == "choice":
        keys.append(choice_A)
    elif drop == "priority":
        keys += [-compared(choice.scores_TE.detach().amax(-1)).repeat_interleave(top_k), choice_A]
    keys.append(torch.where(wanted_A, choice.expert_Tk.flatten(), experts))
    return (places([scope.gather(key) for key in keys]) < limit)[scope.mine(tokens * top_k)] & wanted_A


def places(keys: list[Tensor]) -> Tensor:
    """Each row's place, from 0, among the rows of the same last key, by the other keys, the first one last."""
    ranked = keys[0].argsort()
    for key in keys[1:]:
        ranked = ranked[key[ranked].argsort(stable=True)]
    group = keys[-1][ranked].contiguous()
    place = torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)
    return torch.empty_like(place).scatter_(0, ranked, place)


def rounded(weight: Tensor) -> Tensor:
    """Weights to 12 significant bits.

    `weight` may have any shape.

    Equal tokens (a run of spaces) differ by rounding alone. The choice among them must not depend on the layout of
    the run.
    """
    mantissa, exponent = torch.frexp(weight)
    return torch.ldexp((mantissa * 4096).round(), exponent)


def _padded(routing: Routing, keep_A: Tensor, tokens: int, experts: int, rows: int) -> Routing:
    """The kept assignments and fillers: exactly `rows` of each expert. Nothing waits for the device."""
    group_A = torch.where(keep_A, routing.expert_A, experts)
    place_A = places([routing.token_A, group_A])
    # Dropped assignments all go to one slot more, which is cut off.
    slot_A = torch.where(keep_A, group_A * rows + place_A, experts * rows)
    slots = torch.arange(experts * rows + 1, device=slot_A.device)
    token_S = (slots % tokens).scatter(0, slot_A, routing.token_A)[:-1]
    weight_S = routing.weight_A.new_zeros(len(slots)).scatter(0, slot_A, routing.weight_A)[:-1]
    token_S, order_S = token_S.sort(stable=True)
    return Routing(token_S, order_S // rows, weight_S[order_S], dropped=routing.dropped, rows=rows)
