"""Settings that Megatron-Core's router reads from its configuration in every forward pass.

Frameworks change them during a run, for example a coefficient that rises in steps, or a capacity for evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil
from typing import Any

from moesys.moe.capacity import Capacity
from moesys.moe.losses import Balance


@dataclass(frozen=True)
class MegatronCapacity(Capacity):
    """`Capacity` of this rank's tokens, rounded as Megatron's `get_capacity` rounds."""

    def limit(self, training: bool, tokens: int, top_k: int, experts: float) -> int | None:
        """The assignments C that an expert takes at most; None without a limit."""
        if self.factor is None:
            return None
        # The order matters: 400 · 2 / 8 · 1.1 is more than 110 in float64, and C is 111.
        return min(ceil(tokens * top_k / experts * self.factor), tokens)


def coefficients(config: Any) -> dict[str, float]:
    """Coefficients of the balance losses by Megatron's types; if a type is named twice, the first counts."""
    kinds, values = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    pairs = zip(kinds, values, strict=True) if isinstance(kinds, list) else [(kinds, values)]
    return dict(reversed([(kind, value or 0.0) for kind, value in pairs]))


def balance(config: Any) -> Balance:
    """The coefficients of the losses by this project's names."""
    found = coefficients(config)
    return Balance(
        found.get("aux_loss", 0.0),
        found.get("seq_aux_loss", 0.0),
        found.get("global_aux_loss", 0.0),
        config.moe_z_loss_coeff or 0.0,
    )


def by_name(balance: Balance) -> dict[str, float]:
    """The coefficients by their names."""
    return {f.name: getattr(balance, f.name) for f in fields(balance)}


def capacity(config: Any) -> MegatronCapacity:
    """The capacity, and the assignments that a full expert drops; weights are compared exactly, as in Megatron."""
    drop = config.moe_token_drop_policy
    return MegatronCapacity(
        config.moe_expert_capacity_factor,
        drop="weight" if drop == "probs" else "position",
        pad=config.moe_pad_expert_input_to_capacity,
        exact=True,
    )


def scale(config: Any) -> float:
    """The factor on the weights."""
    return float(config.moe_router_topk_scaling_factor or 1.0)
