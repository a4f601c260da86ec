"""What a gate decides.

Shapes: T tokens held by this device, H hidden size, E experts of the layer, k choices per token,
A assignments (T·k before dropping).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Routing:
    """Assignments of this device's tokens to experts.

    `token_A` and `expert_A` are int64 indices (the token's row in x [T, H]; the expert's global
    number); `weight_A` (float32) multiplies the expert's output. One token may appear any number of
    times, zero included: a token without assignments contributes nothing to the layer's output.
    `losses` are this device's *shares* of the auxiliary losses, coefficients included: the sum over
    the devices that hold the micro-batch is the loss. `load_E` counts this device's assignments per
    expert before any drop; `dropped` how many of them were dropped.
    """

    token_A: Tensor
    expert_A: Tensor
    weight_A: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    load_E: Tensor | None = None
    dropped: Tensor | int = 0


class MicroBatch:
    """The tokens over which batch-wise statistics are defined, when one device holds all of them.

    Balance losses and capacity are defined over a micro-batch. Where a micro-batch is spread over
    devices (context and sequence parallelism), a subclass makes the same questions collective.
    """

    size: int = 1
    """Devices that hold a part of the micro-batch, each as many tokens."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over the devices; not differentiable."""
        return x

    def gather(self, x_T: Tensor) -> Tensor:
        """Rows of all devices, [size·T, …], this device's at `mine(T)`; not differentiable."""
        return x_T

    def mine(self, rows: int) -> slice:
        """Where this device's `rows` rows lie in what `gather` returns."""
        return slice(0, rows)

    def order(self, batch: int, sequence: int, device: torch.device) -> Tensor:
        """Place of each local token in the micro-batch as one device would hold it: int64 [batch·sequence]."""
        return torch.arange(batch * sequence, device=device)


class _AttachLoss(torch.autograd.Function):
    """Identity on x that adds `loss` to the objective where it arises."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, unchanged, such that backward through it also differentiates the scalar `loss`.

    So pipeline stages need to pass no losses along. After Megatron-Core's MoEAuxLossAutoScaler.
    """
    return _AttachLoss.apply(x, loss)
