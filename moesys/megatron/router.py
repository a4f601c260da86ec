"""Token choice by Megatron-Core's definitions, so that a model trains as with Megatron's own router.

They differ from `TopKGate`'s as follows. The balance losses count the plain k best scores, without selection
bias and groups. The global loss is divided by the tokens of all data ranks, over which gradients are averaged again,
and uses the mean of the micro-batches so far. Capacity is counted over a rank's own tokens. The selection bias follows
loads after drops, and may be frozen. Groups under softmax-after-selection are compared by logits, and by as many of
their best experts as a token has per group.

T tokens of this rank, E experts, k choices per token, S positions, B sequences, T = S · B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moesys.kernels.gate import GateResult, best
from moesys.megatron import settings
from moesys.megatron.scope import MegatronTokens
from moesys.moe.counts import occurrences
from moesys.moe.gates.projection import GateProjection
from moesys.moe.gates.top_k import Groups, TopKGate
from moesys.moe.routing import MicroBatch, Routing, Tokens


class DoubleProjection(GateProjection):
    """`GateProjection` in float64, so that the rest of routing is float64: Megatron's `moe_router_dtype` "fp64"."""

    def forward(self, x_TH: Tensor) -> Tensor:
        """Logits float64 [T, E] of x_TH [T, H]."""
        return super().forward(x_TH.double())


@dataclass(frozen=True)
class MegatronExpertGroups(Groups):
    """`Groups` with scores that are the sums of their `best` best experts."""

    best: int = 1

    def limit(self, scores_TE: Tensor) -> Tensor:
        """Scores [T, E] with −inf outside of the kept groups."""
        grouped_TGE = scores_TE.unflatten(-1, (self.count, -1))
        group_TG = grouped_TGE.topk(self.best, dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(-1, best(group_TG, self.kept), True)
        return grouped_TGE.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(-2)


class MegatronGate(TopKGate):
    """`TopKGate` by the definitions of Megatron-Core's `TopKRouter`; see there for the arguments.

    Args:
        jitter: multiply the gate's input by uniform numbers from 1 ± jitter, drawn from torch's generator; in
            evaluation too, as Megatron does.
        biased: True for a selection bias. Megatron alone knows how far it moves in a step: 0 freezes it.
        global_balance: True if the global loss may be on, whatever its coefficient is now.
        options: those of `TopKGate`.

    Attributes:
        expert_bias, local_tokens_per_expert: float32 [E], only with a bias. By these names Megatron's
            `finalize_model_grads` finds the selection bias and the loads that it follows.
    """

    local_tokens_per_expert: Tensor
    global_load_sum: Tensor

    def __init__(
        self,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        jitter: float = 0.0,
        biased: bool = False,
        global_balance: bool = False,
        **options: Any,
    ):
        # TopKGate makes a bias if the rate is not 0.
        super().__init__(hidden, experts, top_k, bias_rate=float(biased), **options)
        self.jitter, self.biased, self.counts_first = jitter, biased, False
        for name, wanted in (("local_tokens_per_expert", biased), ("global_load_sum", global_balance)):
            if wanted:
                self.register_buffer(name, torch.zeros(experts), persistent=False)
        self.has_global_sum = global_balance
        self.passes = 0
        """Forward passes that `global_load_sum` counts."""

    def read_settings(self, config: Any) -> None:
        """Take the settings that Megatron's router reads from its configuration in every forward pass."""
        self.balance, self.capacity, self.scale = (
            settings.balance(config),
            settings.capacity(config),
            settings.scale(config),
        )

    @property
    def expert_bias(self) -> Tensor:
        """The selection bias, float32 [E], by Megatron's name."""
        if not self.biased:
            raise AttributeError("expert_bias")  # Megatron tests for the attribute
        return self.selection_bias

    def reset_state(self) -> None:
        """Set all buffers to 0."""
        super().reset_state()
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def reset_global_aux_loss_tracker(self) -> None:
        """Forget the loads of the global batch; Megatron calls it after each step."""
        self.passes = 0
        if self.has_global_sum:
            self.global_load_sum.zero_()

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        """The routing of tokens x_TH [T, H]; see `Gate.forward`."""
        assert isinstance(tokens, MegatronTokens)
        logits_TE = self.projection(self._shaken(x_TH))
        chosen = self.choose(logits_TE, tokens)
        real_T = tokens.real_T
        # In Megatron, padding takes places of an expert's capacity, too.
        limited = real_T is not None and not self.capacity.unlimited(self.training)
        stays_Tk = self._stays(chosen.weight_Tk, tokens) if limited else None
        routing = self._route(chosen, stays_Tk, replace(tokens, real_T=None), MicroBatch())
        routing.weight_A = routing.weight_A.float()
        if real_T is not None:
            routing.load_E = occurrences(chosen.expert_Tk, self.experts, real_T[:, None].expand_as(chosen.expert_Tk))
        if torch.is_grad_enabled():
            if self.training:
                routing.losses = self._shares(logits_TE, chosen, tokens, scope)
            if self.biased:
                self._count_kept(routing, tokens.real_T)
        return routing

    def _shaken(self, x_TH: Tensor) -> Tensor:
        if not self.jitter:
            return x_TH
        return x_TH * torch.empty_like(x_TH).uniform_(1 - self.jitter, 1 + self.jitter)

    def _selection(self, logits_TE: Tensor) -> Tensor:
        if self.score == "softmax" and self.normalize and self.groups is not None:
            return self.groups.limit(logits_TE)
        return super()._selection(logits_TE)

    @torch.no_grad()
    def _count_kept(self, routing: Routing, real_T: Tensor | None) -> None:
        """Count kept assignments, without padding and fillers, which have weight 0."""
        counted_A = routing.weight_A.detach() != 0
        if real_T is not None:
            counted_A &= real_T[routing.token_A]
        self.local_tokens_per_expert.scatter_add_(0, routing.expert_A, counted_A.to(torch.float32))

    def _shares(
        self, logits_TE: Tensor, chosen: GateResult, tokens: MegatronTokens, scope: MicroBatch
    ) -> dict[str, Tensor]:
        """This rank's share of each loss that is on, coefficient included."""
        b, found = self.balance, {}
        if b.balance or b.sequence_balance or b.global_balance:
            found = self._balances(chosen, tokens, scope)
        if b.z:
            found["z"] = self._z(logits_TE, tokens.real_T) / scope.size
        return {name: getattr(b, name) * loss for name, loss in found.items()}

    def _balances(self, chosen: GateResult, tokens: MegatronTokens, scope: MicroBatch) -> dict[str, Tensor]:
        scores_TE = self._normalized(chosen.probabilities_TE)
        plain = not self.biased and self.groups is None
        expert_Tk = chosen.expert_Tk if plain else best(scores_TE.detach(), self.top_k)
        map_TE = torch.zeros_like(scores_TE).scatter_(1, expert_Tk, 1.0)
        if tokens.real_T is not None:
            scores_TE, map_TE = (x * tokens.real_T[:, None] for x in (scores_TE, map_TE))
        found, load_E = {}, map_TE.sum(0)
        if self.balance.balance:
            whole_E = scope.sum(load_E)
            found["balance"] = self._balance(scores_TE.sum(0), whole_E, whole_E)
        if self.balance.sequence_balance:
            scores_BE, load_BE = (x.view(-1, tokens.sequences, x.shape[1]).sum(0) for x in (scores_TE, map_TE))
            found["sequence_balance"] = self._sequences(scores_BE, scope.sum(load_BE))
        if self.balance.global_balance:
            now_E = scope.sum_global(load_E)
            self.global_load_sum += now_E
            self.passes += 1
            found["global_balance"] = self._balance(scores_TE.sum(0), self.global_load_sum / self.passes, now_E)
        return found

    def _balance(self, score_E: Tensor, load_E: Tensor, now_E: Tensor) -> Tensor:
        """`E · Σ_e f_e · P_e`, f and P both over the tokens of this micro-batch, which `now_E` counts."""
        count = now_E.sum() / self.top_k
        return self.experts * (score_E * load_E).sum() / (self.top_k * count * count).clamp(min=1.0)

    def _sequences(self, score_BE: Tensor, load_BE: Tensor) -> Tensor:
        """The mean over sequences of their balance; a sequence's length is the mean of the real ones."""
        length = load_BE.sum() / (self.top_k * len(load_BE))
        return self.experts * (score_BE * load_BE).sum() / (self.top_k * length * length * len(load_BE)).clamp(min=1.0)

    def _z(self, logits_TE: Tensor, real_T: Tensor | None) -> Tensor:
        square_T = logits_TE.logsumexp(-1).square()
        return square_T.mean() if real_T is None else (square_T * real_T).sum() / real_T.sum().clamp(min=1)
