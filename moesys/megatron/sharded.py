"""The layer's weights for `megatron.core.dist_checkpointing`, with the names and shapes of Megatron's own layer.

So checkpoints of both layers are the same, and load under any expert, tensor and data sizes.

E experts, H hidden, F inner size, G 2 for gated activations and 1 for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesys.megatron.scope import ProcessGroups
from moesys.moe.experts import Experts
from moesys.moe.layer import MoELayer

NAMES = {
    "gate.projection.weight": "router.weight",
    "gate.projection.bias": "router.bias",
    "gate.selection_bias": "router.expert_bias",
    "mix.projection.weight": "shared_experts.gate_weight",
    "experts.fc1": "experts.experts.linear_fc1.weight",
    "experts.fc2": "experts.experts.linear_fc2.weight",
    "experts.fc1_bias": "experts.experts.linear_fc1.bias",
    "experts.fc2_bias": "experts.experts.linear_fc2.bias",
    "shared.gate_proj.weight": "shared_experts.linear_fc1.weight",
    "shared.up_proj.weight": "shared_experts.linear_fc1.weight",
    "shared.down_proj.weight": "shared_experts.linear_fc2.weight",
}
"""Megatron's names of the weights, below its layer."""


@dataclass(frozen=True)
class _Place:
    """A weight's key, the offsets of its enclosing modules, and the number of this copy."""

    key: str
    above: tuple[Any, ...]
    replica: tuple[int, int, int]

    def shard(self, data: Tensor, *splits: tuple[int, int, int]) -> Any:
        """`data` is, for each (dim, number, count) of `splits`, part `number` of `count` along `dim`."""
        from megatron.core.dist_checkpointing import ShardedTensor

        depth = len(self.above)
        offsets = [(dim + depth, number, count) for dim, number, count in splits]
        return ShardedTensor.from_rank_offsets(
            self.key, data, *self.above, *offsets, replica_id=self.replica, prepend_axis_num=depth
        )


def sharded(
    moe: MoELayer, groups: ProcessGroups, own: str, prefix: str, above: tuple[Any, ...], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """By names in the state dict, which begin with `own`, what is saved under `prefix` and Megatron's names.

    `above` are the offsets of the enclosing modules (the block's number among the blocks).
    """
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    data = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"].rank()
    replicas = {
        "experts": (0, 0, groups.expt_dp.rank()),
        "shared": (0, 0, data),
        "gate": (0, groups.tp.rank(), data),
        "mix": (0, groups.tp.rank(), data),
        "zero": (0, groups.tp.rank(), data),
    }
    found = {}
    for name, weight in moe.state_dict(keep_vars=True).items():
        place = _Place(prefix + NAMES.get(name, name), above, replicas[name.split(".")[0]])
        found[own + name] = _shard(moe, name, weight, place, groups)
    return found


def _shard(moe: MoELayer, name: str, weight: Tensor, place: _Place, groups: ProcessGroups) -> Any:
    part, _, rest = name.partition(".")
    tp = (groups.tp.rank(), groups.tp.size())
    if part == "experts":
        return _expert(moe, rest, weight, place, groups)
    if rest in ("gate_proj.weight", "up_proj.weight"):
        kinds = 2 if "shared.gate_proj.weight" in moe.state_dict() else 1
        second = kinds == 2 and rest.startswith("up")
        return place.shard(weight, (0, tp[0] + tp[1] * second, tp[1] * kinds))
    return place.shard(weight, (1, *tp)) if rest == "down_proj.weight" else place.shard(weight)


def _expert(moe: MoELayer, name: str, weight: Tensor, place: _Place, groups: ProcessGroups) -> Any:
    """A factory: shards are made from the weight, or from what an optimiser keeps of it, when they are saved."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    assert isinstance(moe.experts, Experts)
    parts = moe.experts.fc1.shape[2]
    expert = (0, groups.ep.rank(), groups.ep.size())
    inner, ways = groups.expt_tp.rank(), groups.expt_tp.size()

    @torch.no_grad()
    def shards(key: str, tensor: Tensor, replica: Any, _: Any = None) -> Any:
        to = _Place(key, place.above, replica)
        if name == "fc2_bias":
            return [to.shard(tensor, expert)]
        if name == "fc2":
            return [to.shard(tensor.mT.contiguous(), expert, (2, inner, ways))]
        pieces = [piece.mT.contiguous() if name == "fc1" else piece for piece in tensor.unbind(-2)]
        return [to.shard(piece, expert, (1, g * ways + inner, parts * ways)) for g, piece in enumerate(pieces)]

    @torch.no_grad()
    def whole(pieces: list[Tensor]) -> Tensor:
        if name == "fc2_bias":
            return pieces[0]
        if name == "fc2":
            return pieces[0].mT.contiguous()
        return torch.stack([piece.mT if name == "fc1" else piece for piece in pieces], -2)

    return ShardedTensorFactory(place.key, weight, shards, whole, place.replica)
