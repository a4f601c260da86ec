"""The gates of a configuration beside token choice, and routing by force."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from moesys.moe import noise
from moesys.moe.gates import Gate
from moesys.moe.gates.base import BaseGate
from moesys.moe.gates.dense import DenseGate
from moesys.moe.gates.expert_choice import CausalExpertChoiceGate, ExpertChoiceGate
from moesys.moe.gates.forced import Balanced, Skewed
from moesys.moe.gates.hashed import HashGate
from moesys.moe.gates.random import RandomGate
from moesys.moe.gates.replay import ReplayGate
from moesys.moe.gates.sinkhorn import SinkhornGate
from moesys.moe.gates.smear import SmearGate
from moesys.moe.gates.soft import SoftGate
from moesys.moe.routing import Tokens

if TYPE_CHECKING:
    from moesys.config.schema import MoEConfig


def _expert_choice(m: MoEConfig, hidden: int, layer: int) -> Gate:
    kind = CausalExpertChoiceGate if m.gate.causal else ExpertChoiceGate
    return kind(hidden, m.experts, m.top_k, m.capacity_factor or 1.0, m.z_loss)


def _hash(m: MoEConfig, hidden: int, layer: int) -> Gate:
    return HashGate(m.experts, m.top_k, key(m, layer), m.gate.table == "balanced")


BUILDERS: dict[str, Callable[[MoEConfig, int, int], Gate]] = {
    "expert_choice": _expert_choice,
    "sinkhorn": lambda m, hidden, layer: SinkhornGate(hidden, m.experts, m.top_k, m.z_loss),
    "base": lambda m, hidden, layer: BaseGate(hidden, m.experts, m.z_loss),
    "hash": _hash,
    "random": lambda m, hidden, layer: RandomGate(m.experts, m.top_k, key(m, layer)),
    "dense": lambda m, hidden, layer: DenseGate(hidden, m.experts, m.z_loss),
    "soft": lambda m, hidden, layer: SoftGate(hidden, m.experts, m.gate.slots),
    "smear": lambda m, hidden, layer: SmearGate(hidden, m.experts),
    "replay": lambda m, hidden, layer: ReplayGate(hidden, m.experts, m.normalize, m.scale, m.z_loss),
}
"""By kind: from the configuration, the size of a token and the block's number."""


def forced(m: MoEConfig, layer: int) -> Callable[[Tokens], Tensor] | None:
    """What chooses in the gate's place; None if nothing does."""
    if m.gate.force == "balanced":
        return Balanced(m.experts, m.top_k)
    if m.gate.force == "skewed":
        return Skewed(m.experts, m.top_k, m.gate.skew, key(m, layer))
    return None


def key(m: MoEConfig, layer: int) -> int:
    """Of the random numbers that a gate's choice is made of."""
    return noise.key(layer, f"choice/{m.gate.seed}")
