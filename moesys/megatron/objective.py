"""The layer's auxiliary losses in Megatron-Core's backward pass and in its metrics."""

from __future__ import annotations

import torch
from torch import Tensor

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
        layer_number: the block's, from 1 over all pipeline stages; None: losses are not reported.
        layers: blocks of the whole model.
        per_token: Megatron's `calculate_per_token_loss`: it divides gradients by tokens, not by micro-batches.
        coefficients: of the losses by our names, for they are reported without.
    """

    scope: MegatronScope
    layer_number: int | None = None
    layers: int = 1
    per_token: bool = False
    coefficients: dict[str, float]

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        """0, through which backward reaches the losses with the scale that Megatron's schedules set."""
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        for name, loss in losses.items():
            self._report(name, loss.detach())
        total = torch.stack(list(losses.values())).sum()
        if self.per_token:
            total = total * self.scope.real
        nothing: Tensor = MoEAuxLossAutoScaler.apply(torch.zeros_like(total), total)
        return nothing

    def _report(self, name: str, share: Tensor) -> None:
        """Megatron adds the shares up over ranks, but averages z."""
        if self.layer_number is None or not torch.is_grad_enabled():
            return
        value = share / self.coefficients.get(name, 1.0)
        groups, all_data = self.scope.groups, name == "global_balance"
        group = None if name == "z" else groups.tp_dp_cp if all_data else groups.tp_cp
        value = value * self.scope.size if name == "z" else value
        _record(NAMES.get(name, name), value, self.layer_number, self.layers, group, all_data)


def _record(name: str, value: Tensor, number: int, layers: int, group: object, has_data: bool) -> None:
    try:  # from 0.18 on
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ModuleNotFoundError:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(name, value, number, layers, reduce_group=group, reduce_group_has_dp=has_data)
    else:
        get_moe_metrics_tracker().record(name, value, number, layers, reduce_group=group, needs_dp_avg=not has_data)
