"""Hash layers: a token's id decides its experts."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from moesys.moe import noise
from moesys.moe.gates.gate import Gate
from moesys.moe.gates.per_token import route_evenly
from moesys.moe.routing import MicroBatch, Routing, Tokens


class HashGate(Gate):
    """k experts looked up by the token's id in the vocabulary; weights 1/k (Roller et al. 2021, arXiv 2106.04426).

    Args:
        experts, top_k: E and k.
        key: of the random numbers (`moesys.moe.noise.key`).
        balanced: choose the experts such that each has as many tokens of the training data ("balanced
            assignment" of the paper; `fit` has to be called); otherwise at random ("random hash").

    Buffers:
        table_Vk: int64 [V, k], the experts of each id; only if balanced, and only after `fit`.
    """

    table_Vk: Tensor | None

    def __init__(self, experts: int, top_k: int, key: int, balanced: bool = False):
        super().__init__()
        self.experts, self.top_k, self.key, self.balanced = experts, top_k, key, balanced
        self.register_buffer("table_Vk", None)

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        choice = self.forced or self.look_up
        return route_evenly(choice(tokens), self.experts, tokens.real_T)

    def look_up(self, tokens: Tokens) -> Tensor:
        """Experts [T, k] of the tokens' ids."""
        if tokens.id_T is None:
            raise ValueError("a hash gate needs the tokens' ids: pass tokens_BS2 to the layer")
        if self.table_Vk is not None:
            return self.table_Vk[tokens.id_T]
        if self.balanced:
            raise ValueError("a balanced hash gate needs the counts of ids: call fit")
        return noise.uniform(tokens.id_T, self.experts, self.key).topk(self.top_k).indices

    def fit(self, count_V: Tensor) -> None:
        """Make the table for ids that occur `count_V` (int64 [V]) times in the training data."""
        self.table_Vk = balanced_table(count_V, self.experts, self.top_k, self.key)


def balanced_table(count_V: Tensor, experts: int, top_k: int, key: int) -> Tensor:
    """Experts int64 [V, k] of ids that occur `count_V` (int64 [V]) times, all as busy as can be.

    Greedily, as in the paper: the most frequent id first, each to the k experts with the fewest tokens so
    far. Ids count once more than they occur, so that unseen ones are spread too. Which expert is which
    follows from `key`.
    """
    name = noise.uniform(torch.arange(experts), 1, key).flatten().argsort().tolist()
    # Tokens so far, and a number that breaks ties.
    busy = [(0, expert) for expert in range(experts)]
    rows: list[list[int]] = [[]] * len(count_V)
    order = count_V.sort(descending=True, stable=True)
    for identity, count in zip(order.indices.tolist(), order.values.tolist(), strict=True):
        least = [heapq.heappop(busy) for _ in range(top_k)]
        rows[identity] = [name[expert] for _, expert in least]
        for tokens, expert in least:
            heapq.heappush(busy, (tokens + count + 1, expert))
    return torch.tensor(rows, device=count_V.device)
