"""The layer's auxiliary losses in Megatron-Core's backward pass and in its metrics."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from moesys.megatron import settings
from moesys.megatron.router import MegatronGate
from moesys.megatron.scope import MegatronScope
from moesys.moe.layer import MoELayer

NAMES = {
    "balance": "load_balancing_loss",
    "sequence_balance": "seq_load_balancing_loss",
    "global_balance": "global_load_balancing_loss",
    "z": "z_loss",
}
"""Megatron's names of the losses."""


class MegatronMoE(MoELayer):
    """An `MoELayer` inside a Megatron model: x [S, B, H] → same.

    Attributes:
        config: `TransformerConfig`; every forward pass reads its coefficients of losses and its capacity.
        layer_number: the block's, from 1 over all pipeline stages; None: losses are not reported.
        layers: blocks of the whole model, those of multi-token prediction included.
        repeats: runs of the block on a micro-batch: more than 1 if multi-token prediction repeats it.
        per_token: Megatron's `calculate_per_token_loss`: it divides gradients by tokens, not by micro-batches.
        coefficients: of the losses, by our names; losses are reported without them.
    """

    scope: MegatronScope
    config: Any = None
    layer_number: int | None = None
    layers: int = 1
    repeats: int = 1
    per_token: bool = False
    coefficients: dict[str, float]

    def forward(self, x_SBH: Tensor, tokens_SB: Tensor | None = None) -> Tensor:
        """The output [S, B, H] of x_SBH; tokens_SB, bool [S, B], is True for real tokens (None: all are)."""
        if isinstance(self.gate, MegatronGate):
            self.gate.read_settings(self.config)
            self.coefficients = settings.by_name(self.gate.balance)
        return super().forward(x_SBH, tokens_SB)

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        """A zero through which backward reaches the losses, with the scale that Megatron's schedules set."""
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        for name, loss in losses.items():
            self._report(name, loss.detach() / self.repeats)
        total = torch.stack([loss * self._factor(name) for name, loss in losses.items()]).sum()
        nothing: Tensor = MoEAuxLossAutoScaler.apply(torch.zeros_like(total), total)
        return nothing

    def _factor(self, name: str) -> Tensor | float:
        """The factor of a loss in Megatron's backward pass."""
        # For a repeated block, Megatron divides the balance losses, but z only in the metrics.
        share = 1.0 if name == "z" else 1 / self.repeats
        return share * per_token_factor(name, self.scope) if self.per_token else share

    def _report(self, name: str, share: Tensor) -> None:
        """Report a loss to Megatron's metrics, which sum its shares over ranks, but average z."""
        if self.layer_number is None or not torch.is_grad_enabled():
            return
        value = share / self.coefficients.get(name, 1.0)
        groups = self.scope.groups
        if name == "z":
            value = value * self.scope.size
            _record(NAMES[name], value, self.layer_number, self.layers, None, groups.tp_dp_cp, False)
        else:
            all_data = name == "global_balance"
            group = groups.tp_dp_cp if all_data else groups.tp_cp
            _record(NAMES.get(name, name), value, self.layer_number, self.layers, group, None, all_data)


def per_token_factor(name: str, scope: MegatronScope) -> Tensor | float:
    """The factor of a loss in the installed Megatron if gradients are divided by the tokens of the global batch.

    These are the tokens of all tensor and context ranks. Up to 0.18 Megatron takes this rank's alone, so that losses
    count TP · CP times too little, and for the loss of sequences those of one sequence.
    """
    if version()[:2] >= (0, 19):
        return scope.real * scope.size
    return scope.real / scope.sequences if name == "sequence_balance" else scope.real


def version() -> tuple[int, ...]:
    """The version of the installed megatron-core."""
    from megatron.core.package_info import __version__

    return Version(__version__).release


def _record(
    name: str, value: Tensor, number: int, layers: int, group: object, averaged: object, has_data: bool
) -> None:
    more = {"reduce_group": group, "avg_group": averaged}
    try:  # from 0.18 on
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ModuleNotFoundError:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(name, value, number, layers, reduce_group_has_dp=has_data, **more)
    else:
        get_moe_metrics_tracker().record(name, value, number, layers, needs_dp_avg=not has_data, **more)
