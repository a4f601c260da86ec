"""Records of the routing of MoE layers, made from outside of the layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moesys.moe.layer import MoELayer
from moesys.moe.routing import GateOutput, Routing, Tokens


@dataclass(frozen=True)
class RoutingRecord:
    """The experts of tokens, by their numbers, ascending: `number_T` int64; `expert_TK` int16, −1 where a token
    has fewer than K assignments; `weight_TK` float16, 0 there."""

    number_T: Tensor
    expert_TK: Tensor
    weight_TK: Tensor


class RoutingRecorder:
    """Keeps the routings of MoE layers in training.

    A token counts once, though recomputation and counting ahead route it again.

    Args:
        layers: the layers by names of the caller's choice.
    """

    def __init__(self, layers: dict[str, MoELayer]):
        self.kept: dict[str, list[RoutingRecord]] = {name: [] for name in layers}
        self.layers = layers
        self._hooks = {name: partial(self._keep, name) for name in layers}
        for name, hook in self._hooks.items():
            layers[name].routing_hooks.append(hook)

    def _keep(self, name: str, tokens: Tokens, output: GateOutput) -> None:
        if self.layers[name].training and isinstance(output, Routing):
            self.kept[name].append(record(tokens.number_T, output))

    def take(self) -> dict[str, RoutingRecord]:
        """Records since the last call, by layer, on the CPU."""
        taken = {name: joined(parts) for name, parts in self.kept.items() if parts}
        for parts in self.kept.values():
            parts.clear()
        return taken

    def close(self) -> None:
        """Stop recording."""
        for name, hook in self._hooks.items():
            self.layers[name].routing_hooks.remove(hook)


def record(number_T: Tensor, routing: Routing) -> RoutingRecord:
    """The record of one routing, in the order of its tokens; fillers, whose weight is 0, are left out."""
    real = routing.weight_A.detach() != 0
    token_A, expert_A, weight_A = routing.token_A[real], routing.expert_A[real], routing.weight_A.detach()[real]
    place_A = torch.arange(len(token_A), device=token_A.device) - torch.searchsorted(token_A, token_A)
    width = int(place_A.max()) + 1 if len(place_A) else 1
    expert_TK = expert_A.new_full((len(number_T), width), -1, dtype=torch.int16)
    weight_TK = weight_A.new_zeros(len(number_T), width, dtype=torch.float16)
    expert_TK[token_A, place_A] = expert_A.to(torch.int16)
    weight_TK[token_A, place_A] = weight_A.to(torch.float16)
    return RoutingRecord(number_T, expert_TK, weight_TK)


def joined(parts: Iterable[RoutingRecord]) -> RoutingRecord:
    """One record of all tokens of several, each token once, sorted by number."""
    parts = list(parts)
    width = max(part.expert_TK.shape[1] for part in parts)

    def padded(x_TK: Tensor, value: int) -> Tensor:
        return nn.functional.pad(x_TK, (0, width - x_TK.shape[1]), value=value)

    number = torch.cat([part.number_T for part in parts])
    order = number.argsort(stable=True)
    ranked = number[order]
    order = order[torch.cat([ranked.new_ones(1, dtype=torch.bool), ranked.diff() != 0])]
    expert = torch.cat([padded(part.expert_TK, -1) for part in parts])[order]
    weight = torch.cat([padded(part.weight_TK, 0) for part in parts])[order]
    return RoutingRecord(number[order].cpu(), expert.cpu(), weight.cpu())
