"""Random routing: a gate without parameters, by the tokens' numbers."""

from __future__ import annotations

from torch import Tensor

from moesys.moe import noise
from moesys.moe.gates.gate import Gate
from moesys.moe.gates.per_token import route_evenly
from moesys.moe.routing import MicroBatch, Routing, Tokens


class RandomGate(Gate):
    """k distinct experts of E, each set as likely as any other; weights 1/k.

    A token's experts follow from its number in the run, so a sample read again goes the same way. As in
    THOR (arXiv 2110.04260), but drawn anew for each token instead of each batch, and in evaluation too.

    Args:
        experts, top_k: E and k.
        key: of the random numbers (`moesys.moe.noise.key`).
    """

    def __init__(self, experts: int, top_k: int, key: int):
        super().__init__()
        self.experts, self.top_k, self.key = experts, top_k, key

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        choice = self.forced or self.draw
        return route_evenly(choice(tokens), self.experts, tokens.real_T)

    def draw(self, tokens: Tokens) -> Tensor:
        """Experts [T, k]: those of the k largest of E random numbers."""
        return noise.uniform(tokens.number_T, self.experts, self.key).topk(self.top_k).indices
