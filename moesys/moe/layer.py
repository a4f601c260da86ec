"""The MoE layer: gate → dispatch → experts → combine, beside shared experts.

It knows nothing of parallelism. Three of its parts are replaced from outside to distribute it: the
`dispatcher`, the `scope` of batch-wise statistics, and the experts' weights.
"""

from __future__ import annotations

from collections.abc import Callable
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
from moesys.moe.routing import Decision, MicroBatch, Tokens
from moesys.moe.shared import Mix, Mixture
from moesys.moe.zero import ZeroExperts


class LayerStatistics:
    """Sums over the forward passes since the last reset, of this device's tokens, kept on the device.

    `load` [E] and `dropped` count assignments, `calls` forward passes; each loss is the sum of this
    device's shares, coefficient included. Recomputation in backward counts nothing again.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.owed: list[set[str]] = []
        """Of training passes without gradients, the losses that arose: the others do when the pass is recomputed."""

    def add(self, decision: Decision, device: torch.device, training: bool) -> None:
        """Count a forward pass, once however often it runs."""
        losses = {name: loss.detach() for name, loss in decision.losses.items()}
        if recomputing():
            counted = self.owed.pop() if self.owed else losses.keys()
            self._add({name: loss for name, loss in losses.items() if name not in counted})
            return
        if training and not torch.is_grad_enabled():
            self.owed.append(set(losses))
        self._add(losses | self._counts(decision, device))

    def _counts(self, decision: Decision, device: torch.device) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        if decision.load_E is not None:
            parts["load"] = decision.load_E
        if decision.zero_load is not None:
            parts["zero"] = decision.zero_load
        dropped = decision.dropped
        # Not as_tensor, which copies a number from the host and waits for that.
        parts["dropped"] = dropped if isinstance(dropped, Tensor) else torch.full((), dropped, device=device)
        parts["calls"] = torch.ones((), device=device)
        return parts

    def _add(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self.totals[name] = self.totals.get(name, 0) + value

    def take(self) -> dict[str, Tensor]:
        """The sums, which start again from nothing."""
        totals, self.totals, self.owed = self.totals, {}, []
        return totals


class Once:
    """The result of `work`, computed when it is first asked for."""

    def __init__(self, work: Callable[[], Tensor]):
        self.work = work
        self.result: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.result is None:
            self.result = self.work()
        return self.result


@dataclass
class Decided:
    """What a layer decided about a pass' tokens before anything is computed."""

    tokens: Tokens
    decision: Decision
    mixture: Mixture

    def kept(self) -> Decided:
        """The same with what a compiled graph left to the host done: it may wait for the device."""
        self.decision = self.decision.kept()
        return self


class MoELayer(nn.Module):
    """A feed-forward of routed experts, plus an optional shared one.

    Args:
        gate: maps tokens to a `Decision`.
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
        apart: whether experts are run by themselves in any case: something else happens as they start and end.
        watchers: are told of every decision once, and its tokens.
        enter, leave: what makes this device's tokens of the model's stream, and the other way round; one device
            has the same.

    A pass is `decide`, `count`, then `compute`, which a block may run apart: the first and the last are functions
    that a compiler takes and a checkpoint repeats; `count` is neither's.
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
        self.watchers: list[Callable[[Tokens, Decision], None]] = []
        self.enter, self.leave = nn.Identity(), nn.Identity()

    def forward(self, x_BSH: Tensor, tokens_BS2: Tensor | None = None) -> Tensor:
        """Output [B, S, H] in the type of x [B, S, H]; tokens that no expert takes give zeros.

        `tokens_BS2` int64 [B, S, 2]: each token's number in the run and its id in the vocabulary;
        without it tokens are numbered by their place, and gates that need ids cannot be used. In evaluation a
        number below 0 marks padding, which is routed to no expert; training knows none.
        """
        x_BSH = self.enter(x_BSH)
        decided = self.decide(x_BSH, tokens_BS2).kept()
        self.count(decided)
        return self.leave(self.compute(x_BSH, decided))

    def decide(self, x_BSH: Tensor, tokens_BS2: Tensor | None) -> Decided:
        """What gate and mix make of tokens x [B, S, H], their losses attached. Changes nothing."""
        batch, sequence, hidden = x_BSH.shape
        x_TH = x_BSH.reshape(-1, hidden)
        tokens = self.scope.mark(tokens_BS2, batch, sequence, x_BSH.device)
        if not self.training and tokens_BS2 is not None and tokens.real_T is None:
            tokens = tokens.marked()
        decision, mixture = self.gate(x_TH, tokens, self.scope), self.mix(x_TH, self.scope)
        decision.losses |= mixture.losses
        if decision.losses:
            decision.attach(self.objective(decision.losses))
        return Decided(tokens, decision, mixture)

    def count(self, decided: Decided) -> None:
        """Count a pass, once however often it runs; `decided` as `kept` returns it. The one side effect of a pass."""
        decision = decided.decision
        self.statistics.add(decision, decided.tokens.number_T.device, self.training)
        if recomputing():
            return
        if decision.counted is not None:
            self.gate.count(decision.counted)
        for watch in self.watchers:
            watch(decided.tokens, decision)

    def compute(self, x_BSH: Tensor, decided: Decided) -> Tensor:
        """The layer's output, of experts and what joins them."""
        dense = None if self.shared is None else Once(partial(self.shared, x_BSH))
        routed = self.run_experts(x_BSH, decided, dense)
        return self.join(x_BSH, routed, decided, None if dense is None else dense())

    def run_experts(self, x_BSH: Tensor, decided: Decided, dense: Once | None = None) -> Tensor:
        """The routed experts' sums [B, S, H]; a dispatcher that sends tokens may compute `dense` meanwhile."""
        x_TH, experts = x_BSH.reshape(-1, x_BSH.shape[-1]), cast(Experts, self.experts)
        if not self.dispatcher.communicates:
            return decided.decision.run(x_TH, self.dispatcher, experts).view_as(x_BSH)
        with self.dispatcher.overlapping(dense):
            return decided.decision.run(x_TH, self.dispatcher, experts).view_as(x_BSH)

    def run_shared(self, x_BSH: Tensor) -> Tensor:
        """The shared experts' output [B, S, H]."""
        assert self.shared is not None
        out: Tensor = self.shared(x_BSH)
        return out

    def join(self, x_BSH: Tensor, routed_BSH: Tensor, decided: Decided, dense_BSH: Tensor | None) -> Tensor:
        """All branches' sum [B, S, H]: routed, zero-computation and shared experts."""
        zero_TZ = decided.decision.zero_TZ
        if self.zero is not None and zero_TZ is not None:
            x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
            routed_BSH = routed_BSH + self.zero(x_TH, zero_TZ).view_as(x_BSH)
        return routed_BSH if dense_BSH is None else decided.mixture.join(routed_BSH, dense_BSH)

    def objective(self, losses: dict[str, Tensor]) -> Tensor:
        """What this device's shares of the losses add to what is minimised: a scalar."""
        return torch.stack(list(losses.values())).sum() * self.loss_scale


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """All MoE layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
