"""Converts weights of an MoE layer between this project's layer, as in the plug-in, and Megatron-Core's own.

All of it happens on one rank, on the whole or its part: `from_megatron` and `to_megatron` change names and shapes,
`part` and `whole` cut and join. Gradients and optimizer states convert alike.

E experts, H hidden, F inner size, G 2 for gated activations and 1 for others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["sequential", "grouped", "legacy_grouped"]
"""Megatron's experts: `SequentialMLP`, `TEGroupedMLP`, and `GroupedMLP` (up to 0.17)."""

ROUTER = {
    "router.weight": "gate.projection.weight",
    "router.bias": "gate.projection.bias",
    "router.expert_bias": "gate.selection_bias",
    "shared_experts.gate_weight": "mix.projection.weight",
    "shared_experts.linear_fc2.weight": "shared.down_proj.weight",
}

_SEQUENTIAL = re.compile(r"experts\.local_experts\.(\d+)\.linear_(fc[12])\.(weight|bias)")
_GROUPED = re.compile(r"experts\.linear_(fc[12])\.(weight|bias)(\d+)")


def from_megatron(state: Mapping[str, Tensor], gated: bool = True) -> dict[str, Tensor]:
    """State of an `MoELayer` of this project from that of Megatron's, of any `Layout`.

    `gated`: True if the activation has a gate. Extra states of Transformer Engine are left out.

    Raises:
        KeyError: a weight that no MoE layer has.
    """
    found: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for name, weight in state.items():
        if name.endswith("_extra_state"):
            continue
        if match := _SEQUENTIAL.fullmatch(name):
            rows.setdefault(_own(match[2], match[3]), {})[int(match[1])] = weight
        elif match := _GROUPED.fullmatch(name):
            rows.setdefault(_own(match[1], match[2]), {})[int(match[3])] = weight
        elif name == "shared_experts.linear_fc1.weight":
            names = ("shared.gate_proj.weight", "shared.up_proj.weight") if gated else ("shared.up_proj.weight",)
            found |= dict(zip(names, weight.chunk(len(names)), strict=True))
        elif name not in ("experts.weight1", "experts.weight2"):
            found[ROUTER[name]] = weight
    for name, numbered in rows.items():
        found[name] = _ours(name, torch.stack([numbered[number] for number in sorted(numbered)]), gated)
    return found | _from_legacy(state, gated)


def _own(product: str, kind: str) -> str:
    return f"experts.{product}" + ("_bias" if kind == "bias" else "")


def _ours(name: str, weight: Tensor, gated: bool) -> Tensor:
    """This project's form of weights [E, out, in] or biases [E, out]."""
    if name == "experts.fc2_bias":
        return weight
    if name == "experts.fc2":
        return weight.mT.contiguous()
    parts = weight.unflatten(1, (1 + gated, -1))
    return parts if name == "experts.fc1_bias" else parts.permute(0, 3, 1, 2).contiguous()


def _from_legacy(state: Mapping[str, Tensor], gated: bool) -> dict[str, Tensor]:
    """Weights from [H, E · G · F] and [E · F, H], which Megatron views as [E, H, G · F] and [E, F, H]."""
    if "experts.weight1" not in state:
        return {}
    first, second = state["experts.weight1"], state["experts.weight2"]
    hidden = len(first)
    experts = len(state["router.weight"]) if "router.weight" in state else 0
    inner = first.shape[1] * hidden // ((1 + gated) * second.shape[1])  # E · F
    assert inner == len(second) and experts
    fc1 = first.view(experts, hidden, 1 + gated, -1)
    return {"experts.fc1": fc1, "experts.fc2": second.view(experts, -1, hidden)}


def to_megatron(state: Mapping[str, Tensor], layout: Layout = "sequential") -> dict[str, Tensor]:
    """The inverse of `from_megatron`."""
    names = {ours: theirs for theirs, ours in ROUTER.items()}
    found: dict[str, Tensor] = {}
    first = [state[n] for n in ("shared.gate_proj.weight", "shared.up_proj.weight") if n in state]
    if first:
        found["shared_experts.linear_fc1.weight"] = torch.cat(first)
    for name, weight in state.items():
        if name.startswith("experts."):
            found |= _theirs(name.removeprefix("experts."), weight, layout)
        elif not name.startswith("shared.") or name in names:
            found[names[name]] = weight
    return found


def _theirs(name: str, weight: Tensor, layout: Layout) -> dict[str, Tensor]:
    product, _, bias = name.partition("_")
    kind = bias or "weight"
    if layout == "legacy_grouped":
        # Views of the same numbers.
        shape = (weight.shape[1], -1) if product == "fc1" else (-1, weight.shape[2])
        return {f"experts.weight{product[-1]}": weight.reshape(shape)}
    if product == "fc1":
        weight = weight.flatten(1) if bias else weight.permute(0, 2, 3, 1).flatten(1, 2)
    elif not bias:
        weight = weight.mT
    pattern = "experts.local_experts.{0}.linear_{1}.{2}" if layout == "sequential" else "experts.linear_{1}.{2}{0}"
    return {pattern.format(number, product, kind): row.contiguous() for number, row in enumerate(weight)}


@dataclass(frozen=True)
class Place:
    """The place of a rank: its number among `ep` expert ranks, `etp` expert-tensor ranks, and `tp` tensor ranks."""

    ep_rank: int = 0
    ep: int = 1
    etp_rank: int = 0
    etp: int = 1
    tp_rank: int = 0
    tp: int = 1

    def cuts(self, name: str) -> list[tuple[int, int, int]]:
        """(dim, number, count) of the part of a weight of this project."""
        inner = {"experts.fc1": 3, "experts.fc1_bias": 2, "experts.fc2": 1}
        if name.startswith("experts."):
            split = [(0, self.ep_rank, self.ep)]
            return [*split, (inner[name], self.etp_rank, self.etp)] if name in inner else split
        if name.startswith("shared."):
            return [(1 if "down_proj" in name else 0, self.tp_rank, self.tp)]
        return []


def part(state: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    """The plug-in's part on a rank of the whole layer's state."""
    found = dict(state)
    for name, weight in found.items():
        for dim, number, count in place.cuts(name):
            weight = weight.chunk(count, dim)[number]
        found[name] = weight.contiguous()
    return found


def whole(parts: Sequence[tuple[Place, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The whole layer's state from the parts of ranks; every part must be there, and copies may be."""
    found: dict[str, Tensor] = {}
    for name, weight in parts[0][1].items():
        shape = list(weight.shape)
        for dim, _, count in parts[0][0].cuts(name):
            shape[dim] *= count
        found[name] = weight.new_empty(shape)
    for place, state in parts:
        for name, weight in state.items():
            target = found[name]
            for dim, number, count in place.cuts(name):
                target = target.chunk(count, dim)[number]
            target.copy_(weight)
    return found
