"""Experts with biases that Megatron-Core's optimizer recognizes.

The optimizer applies weight decay to a parameter unless its name ends in ".bias" or its shape has one dim; stacked
biases have more dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesys.moe.experts import Experts

NAMES = {"fc1_bias": "linear_fc1.bias", "fc2_bias": "linear_fc2.bias"}
"""Names of the biases in `Experts`, and of the parameters here."""


def own_name(name: str) -> str:
    """The name in a `Decoder`, or in a state dict, of a parameter of a layer with `MegatronExperts`."""
    for own, theirs in NAMES.items():
        name = name.replace(f"experts.{theirs}", f"experts.{own}")
    return name


class Bias(nn.Module):
    """A module that holds a bias as its parameter `bias`."""

    def __init__(self, *shape: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from zeros."""
        nn.init.zeros_(self.bias)


class MegatronExperts(Experts):
    """`Experts` with biases `linear_fc1.bias` [E, G, F] and `linear_fc2.bias` [E, H].

    State dicts have them under their names in `Experts`.
    """

    def __init__(self, experts: int, hidden: int, ffn_hidden: int, activation: str = "swiglu", bias: bool = False):
        super().__init__(experts, hidden, ffn_hidden, activation)
        self.linear_fc1 = Bias(experts, self.fc1.shape[2], ffn_hidden) if bias else None
        self.linear_fc2 = Bias(experts, hidden) if bias else None
        self.register_state_dict_post_hook(_to_own)
        self.register_load_state_dict_pre_hook(_from_own)

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """The biases [E, G, F] and [E, H], or None for each."""
        first, second = self.linear_fc1, self.linear_fc2
        return None if first is None else first.bias, None if second is None else second.bias


def _to_own(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    for own, theirs in NAMES.items():
        if prefix + theirs in state:
            state[prefix + own] = state.pop(prefix + theirs)


def _from_own(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for own, theirs in NAMES.items():
        if prefix + own in state:
            state[prefix + theirs] = state.pop(prefix + own)
