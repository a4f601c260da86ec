"""What a gate decides.

Shapes: T tokens held by this device, H hidden size, E experts of the layer, k choices per token,
A assignments (T·k before dropping).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moesys.moe.dispatch import Dispatcher
    from moesys.moe.experts import Experts as ExpertsModule


@dataclass(frozen=True)
class Tokens:
    """What is known of a device's tokens beside their vectors, in the order of x [T, H].

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
        """The same, with tokens of numbers below 0 as padding."""
        return replace(self, real_T=self.number_T >= 0)

    def count(self, scope: MicroBatch) -> int:
        """Number of the micro-batch's tokens that are no padding."""
        if self.real_T is None:
            return len(self.number_T) * scope.size
        return int(scope.sum(self.real_T.sum()))


@dataclass
class Decision:
    """What a gate decides about this device's tokens.

    `losses` are this device's *shares* of the auxiliary losses, coefficients included: the sum over
    the devices that hold the micro-batch is the loss. `load_E` counts this device's assignments per
    expert before any drop; `dropped` how many of them were dropped.

    Zero-computation experts, where a gate has Z of them, are computed where the token is: `zero_TZ` float32
    are their weights, `zero_load` how many assignments they got.

    `counted` is what the gate adds to its statistics of the step (`Gate.count`), None where it has none.
    """

    losses: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    load_E: Tensor | None = field(default=None, kw_only=True)
    dropped: Tensor | int = field(default=0, kw_only=True)
    zero_TZ: Tensor | None = field(default=None, kw_only=True)
    zero_load: Tensor | None = field(default=None, kw_only=True)
    counted: Tensor | None = field(default=None, kw_only=True)

    @property
    def ragged(self) -> bool:
        """Whether `kept` is still to find out how much there is to compute: the device alone knows."""
        return False

    def kept(self) -> Decision:
        """The decision as experts take it, where a compiled graph left something to do: it may wait for the device."""
        return self

    def attach(self, loss: Tensor) -> None:
        """Let backward through this decision differentiate the scalar `loss` too."""
        raise NotImplementedError

    def run(self, x_TH: Tensor, dispatcher: Dispatcher, experts: ExpertsModule) -> Tensor:
        """The experts' weighted sum for every token: [T, H] in the type of x."""
        raise NotImplementedError


@dataclass
class Routing(Decision):
    """Assignments of tokens to experts: what sparse gates decide.

    `token_A` (ascending) and `expert_A` are int64 indices (the token's row in x [T, H]; the expert's
    global number); `weight_A` (float32) multiplies the expert's output. One token may appear any number
    of times, zero included: a token without assignments contributes nothing to the layer's output.

    `keep_A` bool [A] says which of the rows above are assignments at all; None: all of them. Compiled graphs
    leave the others in their places, for how many there are the device alone knows: `kept` takes them out.

    `rows`: every expert has exactly so many of the assignments, on every device; None: that is not known.
    """

    token_A: Tensor
    expert_A: Tensor
    weight_A: Tensor
    keep_A: Tensor | None = field(default=None, kw_only=True)
    rows: int | None = field(default=None, kw_only=True)

    def attach(self, loss: Tensor) -> None:
        self.weight_A = attach_loss(self.weight_A, loss)

    @property
    def ragged(self) -> bool:
        return self.keep_A is not None

    def kept(self) -> Routing:
        if self.keep_A is None:
            return self
        row = self.keep_A.nonzero().squeeze(1)
        token_A, expert_A, weight_A = (x.index_select(0, row) for x in (self.token_A, self.expert_A, self.weight_A))
        return replace(self, token_A=token_A, expert_A=expert_A, weight_A=weight_A, keep_A=None)

    def run(self, x_TH: Tensor, dispatcher: Dispatcher, experts: ExpertsModule) -> Tensor:
        return dispatcher(x_TH, self, experts)


def only(routing: Routing, keep_A: Tensor | None) -> Routing:
    """`routing` without the assignments that are not `keep_A` (bool [A], None: all are).

    A graph that is compiled marks them instead: it would end where the host must know how many there are.
    """
    routing.keep_A = keep_A
    return routing if torch.compiler.is_compiling() else routing.kept()


class MicroBatch:
    """The tokens over which batch-wise statistics are defined, when one device holds all of them.

    Balance losses and capacity are defined over a micro-batch. Where a micro-batch is spread over
    devices (context and sequence parallelism), a subclass makes the same questions collective. A
    global batch is all micro-batches of a step, wherever they run.
    """

    size: int = 1
    """Devices that hold a part of the micro-batch, each as many tokens."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over the devices; not differentiable."""
        return x

    def sum_global(self, x: Tensor) -> Tensor:
        """Sum of x over all devices that run a micro-batch of the global batch now; not differentiable."""
        return self.sum(x)

    def gather(self, x_T: Tensor) -> Tensor:
        """Rows of all devices, [size·T, …], this device's at `mine(T)`; not differentiable."""
        return x_T

    def mine(self, rows: int) -> slice:
        """Where this device's `rows` rows lie in what `gather` returns."""
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
        """Of tokens [B, S, …] of this context rank those that the layer's input holds."""
        return tokens


class _AttachLoss(torch.autograd.Function):
    """Identity on x that adds `loss` to the objective where it arises."""

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

    So pipeline stages need to pass no losses along. After Megatron-Core's MoEAuxLossAutoScaler.
    """
    return _AttachLoss.apply(x, loss)
