"""The MoE layer: gate → dispatch → experts → combine, beside shared experts.

It knows nothing of parallelism. Three of its parts are replaced from outside to distribute it: the
`dispatcher`, the `scope` of batch-wise statistics, and the experts' weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from moesys.moe.dispatch import Dispatcher
from moesys.moe.experts import Experts
from moesys.moe.gates import Gate
from moesys.moe.lora import LoRAExperts
from moesys.moe.passes import recomputing
from moesys.moe.routing import GateOutput, MicroBatch, Tokens
from moesys.moe.shared import Mix, Mixture
from moesys.moe.zero import ZeroExperts


class LayerStatistics:
    """Sums over the forward passes since the last reset, of this device's tokens; they stay on the device.

    `load` [E] and `dropped` count assignments, `calls` forward passes; each loss is the sum of this
    device's shares, coefficient included. Recomputation in backward counts nothing again.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor | int] = {}
        self.device = torch.device("cpu")
        self.owed: list[set[str]] = []
        """Losses of each training pass without gradients; the other losses arise when the pass is recomputed."""

    def add(self, output: GateOutput, device: torch.device, training: bool) -> bool:
        """Count a forward pass, once however often it runs; whether this is the first time."""
        losses = {name: loss.detach() for name, loss in output.losses.items()}
        if recomputing():
            counted = self.owed.pop() if self.owed else losses.keys()
            self._add({name: loss for name, loss in losses.items() if name not in counted})
            return False
        if training and not torch.is_grad_enabled():
            self.owed.append(set(losses))
        self.device = device
        self._add(losses)
        self._add({"load": output.load_E, "zero": output.zero_load, "dropped": output.dropped, "calls": 1})
        return True

    def _add(self, parts: Mapping[str, Tensor | int | None]) -> None:
        for name, value in parts.items():
            if value is not None:
                self.totals[name] = self.totals[name] + value if name in self.totals else value

    def take(self) -> dict[str, Tensor]:
        """The sums; they start again from zero."""
        totals, self.totals, self.owed = self.totals, {}, []
        # Not as_tensor, which copies a number from the host and waits for that.
        return {n: v if isinstance(v, Tensor) else torch.full((), v, device=self.device) for n, v in totals.items()}


class Lazy:
    """A lazy value: the result of `work`, computed at the first call."""

    def __init__(self, work: Callable[[], Tensor]):
        self.work = work
        self.result: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.result is None:
            self.result = self.work()
        return self.result


@dataclass
class RoutedTokens:
    """The tokens of one pass with the outputs of the layer's gate and mix, before any expert runs."""

    tokens: Tokens
    output: GateOutput
    mixture: Mixture

    def compacted(self) -> RoutedTokens:
        """The same without masked assignments (`GateOutput.compacted`); this may wait for the device."""
        self.output = self.output.compacted()
        return self


class MoELayer(nn.Module):
    """A feed-forward of routed experts, plus an optional shared one.

    Args:
        gate: maps tokens to a `GateOutput`.
        experts: the routed experts.
        shared: a module [B, S, H] → [B, S, H] that takes every token, or None.
        zero: the zero-computation experts that the gate names beside the routed ones, where any compute.
        mix: how the output of `shared` joins the routed one; default: they are added.

    Attributes:
        dispatcher: moves tokens to experts and back; one device only permutes.
        scope: the tokens over which statistics are defined; one device holds all of a micro-batch.
        loss_scale: factor on the auxiliary losses in backward, such that the objective is their mean
            over the micro-batches of the global batch; reported values are unscaled.
        statistics: what was routed where, for metrics.
        apart: whether experts always run between compiled graphs, because something happens as they start and end.
        routing_hooks: functions that get the tokens and the gate's output of every pass, once.
        enter, leave: modules from the model's stream to this device's tokens and back; identities on one device.

    A pass is `route`, `count`, then `compute`, which a block may run one by one: `torch.compile` takes the first and
    the last, and a checkpoint repeats them; `count` is for neither.
    """

    def __init__(
        self,
        gate: Gate,
        experts: Experts | LoRAExperts,
        shared: nn.Module | None = None,
        zero: ZeroExperts | None = None,
        mix: Mix | None = None,
    ):
        super().__init__()
        self.gate, self.experts, self.shared, self.zero = gate, experts, shared, zero
        self.mix = Mix() if mix is None else mix
        self.dispatcher = Dispatcher(gate.experts)
        self.scope = MicroBatch()
        self.loss_scale = 1.0
        self.statistics = LayerStatistics()
        self.apart = False
        self.routing_hooks: list[Callable[[Tokens, GateOutput], None]] = []
        self.enter, self.leave = nn.Identity(), nn.Identity()

    def forward(self, x_BSH: Tensor, tokens_BS2: Tensor | None = None) -> Tensor:
        """Output [B, S, H] in the type of x [B, S, H]; tokens that no expert takes give zeros.

        `tokens_BS2` int64 [B, S, 2]: each token's number in the run and its id in the vocabulary;
        without it tokens are numbered by their place, and gates that need ids cannot be used. In evaluation a
        number below 0 marks padding, which is routed to no expert; training knows none.
        """
        x_BSH = self.enter(x_BSH)
        routed = self.route(x_BSH, tokens_BS2).compacted()
        self.count(routed)
        return self.leave(self.compute(x_BSH, routed))

    def route(self, x_BSH: Tensor, tokens_BS2: Tensor | None) -> RoutedTokens:
        """The outputs of gate and mix for tokens x [B, S, H], their losses attached; no side effects."""
        batch, sequence, hidden = x_BSH.shape
        x_TH = x_BSH.reshape(-1, hidden)
        tokens = self.scope.mark(tokens_BS2, batch, sequence, x_BSH.device)
        if not self.training and tokens_BS2 is not None and tokens.real_T is None:
            tokens = tokens.marked()
        output, mixture = self.gate(x_TH, tokens, self.scope), self.mix(x_TH, self.scope)
        output.losses |= mixture.losses
        if output.losses:
            output.attach(self.objective(output.losses))
        return RoutedTokens(tokens, output, mixture)

    def count(self, routed: RoutedTokens) -> None:
        """Count a pass, once however often it runs: its only side effect. `routed` as `compacted` returns it."""
        output = routed.output
        if not self.statistics.add(output, routed.tokens.number_T.device, self.training):
            return
        if output.counted is not None:
            self.gate.count(output.counted)
        for hook in self.routing_hooks:
            hook(routed.tokens, output)

    def compute(self, x_BSH: Tensor, routed: RoutedTokens) -> Tensor:
        """The layer's output [B, S, H]: routed, zero-computation and shared experts."""
        dense = None if self.shared is None else Lazy(partial(self.shared, x_BSH))
        routed_BSH = self.run_experts(x_BSH, routed, dense)
        return self.join(x_BSH, routed_BSH, routed, None if dense is None else dense())

    def run_experts(self, x_BSH: Tensor, routed: RoutedTokens, dense: Lazy | None = None) -> Tensor:
        """The routed experts' sums [B, S, H]; a dispatcher that communicates may compute `dense` meanwhile."""
        x_TH, experts = x_BSH.reshape(-1, x_BSH.shape[-1]), cast(Experts, self.experts)
        if not self.dispatcher.communicates:
            return routed.output.run(x_TH, self.dispatcher, experts).view_as(x_BSH)
        with self.dispatcher.overlapping(dense):
            return routed.output.run(x_TH, self.dispatcher, experts).view_as(x_BSH)

    def run_shared(self, x_BSH: Tensor) -> Tensor:
        """The shared experts' output [B, S, H]."""
        assert self.shared is not None
        out: Tensor = self.shared(x_BSH)
        return out

    def join(self, x_BSH: Tensor, routed_BSH: Tensor, routed: RoutedTokens, dense_BSH: Tensor | None) -> Tensor:
        """All branches' sum [B, S, H]: routed, zero-computation and shared experts."""
        zero_TZ = routed.output.zero_TZ
        if self.zero is not None and zero_TZ is not None:
            x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
            routed_BSH = routed_BSH + self.zero(x_TH, zero_TZ).view_as(x_BSH)
        return routed_BSH if dense_BSH is None else routed.mixture.join(routed_BSH, dense_BSH)

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        """This device's share of the auxiliary losses in the objective: a scalar."""
        first, *rest = losses.values()
        total = torch.stack([first, *rest]).sum() if rest else first
        return total * self.loss_scale


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """All MoE layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
