"""Outputs of gates: assignments of tokens to experts, and their losses.

Shapes: T tokens held by this device, H hidden size, E experts of the layer, k choices per token,
A assignments (T·k before dropping).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moesys.moe.dispatch import Assignments, Dispatcher
from moesys.moe.experts import Experts


@dataclass(frozen=True)
class Tokens:
    """Numbers, ids and padding of a device's tokens, in the order of x [T, H].

    x holds `sequences` sequences (or this device's part of each) one after another. `number_T`
    (int64) is unique to a token over the whole run and ascends along a micro-batch as one device would
    hold it: it orders tokens, and seeds their random numbers. `id_T` (int64) are the ids of the
    vocabulary, None where a layer is used alone. `real_T` bool, False for padding, None where there is none:
    padding takes no place in an expert from other tokens, and counts in no load.
    """

    number_T: Tensor
    sequences: int = 1
    id_T: Tensor | None = None
    real_T: Tensor | None = None

    def marked(self) -> Tokens:
        """The same tokens; those with numbers below 0 are padding."""
        return replace(self, real_T=self.number_T >= 0)

    def count(self, scope: MicroBatch) -> int:
        """Number of the micro-batch's tokens without padding."""
        if self.real_T is None:
            return len(self.number_T) * scope.size
        return int(scope.sum(self.real_T.sum()))


@dataclass
class GateOutput:
    """The output of a gate for this device's tokens.

    `losses` are this device's *shares* of the auxiliary losses, coefficients included: the sum over
    the devices that hold the micro-batch is the loss. `load_E` counts this device's assignments per
    expert before any drop; `dropped` how many of them were dropped.

    Zero-computation experts, where a gate has Z of them, are computed where the token is: `zero_TZ` float32
    are their weights, `zero_load` how many assignments they got.

    `counted`: the gate's contribution to its statistics of the step (`Gate.count`), None where it has none.
    """

    losses: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    load_E: Tensor | None = field(default=None, kw_only=True)
    dropped: Tensor | int = field(default=0, kw_only=True)
    zero_TZ: Tensor | None = field(default=None, kw_only=True)
    zero_load: Tensor | None = field(default=None, kw_only=True)
    counted: Tensor | None = field(default=None, kw_only=True)

    @property
    def ragged(self) -> bool:
        """Whether masked assignments remain: then only the device knows how many there are to compute."""
        return False

    def compacted(self) -> GateOutput:
        """The output without masked assignments, as experts take it; this may wait for the device."""
        return self

    def attach(self, loss: Tensor) -> None:
        """Let backward through this output differentiate the scalar `loss` too."""
        raise NotImplementedError

    def run(self, x_TH: Tensor, dispatcher: Dispatcher, experts: Experts) -> Tensor:
        """The experts' weighted sum for every token: [T, H] in the type of x."""
        raise NotImplementedError


@dataclass
class Routing(Assignments, GateOutput):
    """Assignments of tokens to experts: the output of sparse gates.

    `keep_A` bool [A] masks the rows that are assignments; None: all of them. Compiled graphs leave the others in
    their places, since only the device knows how many there are; `compacted` takes them out.
    """

    keep_A: Tensor | None = field(default=None, kw_only=True)

    def attach(self, loss: Tensor) -> None:
        self.weight_A = attach_loss(self.weight_A, loss)

    @property
    def ragged(self) -> bool:
        return self.keep_A is not None

    def compacted(self) -> Routing:
        if self.keep_A is None:
            return self
        row = self.keep_A.nonzero().squeeze(1)
        token_A, expert_A, weight_A = (x.index_select(0, row) for x in (self.token_A, self.expert_A, self.weight_A))
        return replace(self, token_A=token_A, expert_A=expert_A, weight_A=weight_A, keep_A=None)

    def run(self, x_TH: Tensor, dispatcher: Dispatcher, experts: Experts) -> Tensor:
        return dispatcher(x_TH, self, experts)


def only(routing: Routing, keep_A: Tensor | None) -> Routing:
    """`routing` without the assignments that are not `keep_A` (bool [A], None: all are).

    A compiled graph masks them instead: it would break where the host must know how many there are.
    """
    routing.keep_A = keep_A
    return routing if torch.compiler.is_compiling() else routing.compacted()


class MicroBatch:
    """The tokens over which batch-wise statistics are defined, when one device holds all of them.

    Balance losses and capacity are defined over a micro-batch. Where a micro-batch is spread over
    devices (context and sequence parallelism), a subclass makes these methods collective. A
    global batch is all micro-batches of a step, wherever they run.
    """

    size: int = 1
    """Devices that hold a part of the micro-batch, each as many tokens."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over the devices; not differentiable. `x` may have any shape."""
        return x

    def sum_global(self, x: Tensor) -> Tensor:
        """Sum of x over all devices that run a micro-batch of the global batch now; not differentiable.

        `x` may have any shape.
        """
        return self.sum(x)

    def gather(self, x_T: Tensor) -> Tensor:
        """Rows of all devices, [size·T, …], this device's at `mine(T)`; not differentiable."""
        return x_T

    def mine(self, rows: int) -> slice:
        """The slice of this device's `rows` rows in the result of `gather`."""
        return slice(0, rows)

    def mark(self, tokens: Tensor | None, batch: int, sequence: int, device: torch.device) -> Tokens:
        """The layer's tokens. `tokens` int64 [B, S, 2]: number and id of this context rank's tokens.

        `batch` and `sequence` are those of the layer's own input, a part of S under sequence
        parallelism; without `tokens` they are numbered by their place in the micro-batch.
        """
        if tokens is None:
            return Tokens(torch.arange(batch * sequence, device=device), batch)
        number, identity = self.part(tokens).flatten(0, 1).unbind(-1)
        return Tokens(number, batch, identity)

    def part(self, tokens: Tensor) -> Tensor:
        """The tokens [B, …] of the layer's input, among tokens [B, S, …] of this context rank."""
        return tokens


class _AttachLoss(torch.autograd.Function):
    """Identity on x that adds `loss` to the objective."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(loss)
        # Not a view: a compiled graph that ends here would differentiate x in its place, without the loss.
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, unchanged, such that backward through it also differentiates the scalar `loss`.

    So pipeline stages pass no losses along. After Megatron-Core's MoEAuxLossAutoScaler.
    """
    return _AttachLoss.apply(x, loss)
