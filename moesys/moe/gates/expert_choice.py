"""Expert choice: experts choose their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.moe.capacity import capacity, rounded
from moesys.moe.counts import occurrences
from moesys.moe.gates.scored import ScoredGate
from moesys.moe.routing import MicroBatch, Routing, Tokens, only

NONE = 1e-30
"""A threshold that every token passes; its logarithm is finite."""


class ExpertChoiceGate(ScoredGate):
    """Each expert takes the C = ceil(capacity_factor · T · k / E) tokens of the micro-batch that score best.

    The score, softmax(x·w) over experts, is the weight too (Zhou et al. 2022, arXiv 2202.09368). Load is
    balanced by construction; a token may go to any number of experts, none included.

    **Not causal**: whether a token is taken depends on later tokens. So training leaks the future into an
    autoregressive model, which cannot generate as it was trained. `CausalExpertChoiceGate` is for such models.

    Args:
        hidden, experts, z_loss: see `ScoredGate`.
        top_k: k, the experts that a token goes to on average.
        capacity_factor: factor on that average.
    """

    def __init__(self, hidden: int, experts: int, top_k: int, capacity_factor: float = 1.0, z_loss: float = 0.0):
        super().__init__(hidden, experts, z_loss)
        self.top_k, self.capacity_factor = top_k, capacity_factor

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        logits_TE = self.projection(x_TH)
        score_TE = logits_TE.softmax(-1)
        taken_TE = self.taken(score_TE.detach(), tokens, scope)
        token_A = torch.arange(len(x_TH), device=x_TH.device).repeat_interleave(self.experts)
        expert_A = torch.arange(self.experts, device=x_TH.device).repeat(len(x_TH))
        routing = Routing(token_A, expert_A, score_TE.flatten(), load_E=taken_TE.sum(0))
        routing.counted = self.statistics(score_TE.detach())
        return self.with_losses(only(routing, taken_TE.flatten()), logits_TE, scope)

    def statistics(self, score_TE: Tensor) -> Tensor | None:
        """The contribution of these scores to the statistics of the step; None without statistics."""
        return None

    def taken(self, score_TE: Tensor, tokens: Tokens, scope: MicroBatch) -> Tensor:
        """Mask of the tokens of this device that each expert takes: bool [T, E].

        Scores are compared to 12 bits, and ties go to the earliest token: the choice among equal tokens must not depend
        on the layout of the run.
        """
        count = tokens.count(scope)
        if tokens.real_T is not None:
            # Below every score, so that padding comes last: never among the tokens that are taken.
            score_TE = score_TE.masked_fill(~tokens.real_T[:, None], -1.0)
        score, number = scope.gather(score_TE), scope.gather(tokens.number_T)
        limit = min(capacity(self.capacity_factor, count, self.top_k, self.experts), count)
        order = number.argsort()
        best_CE = rounded(score[order]).argsort(dim=0, descending=True, stable=True)[:limit]
        taken = torch.zeros_like(score, dtype=torch.bool).scatter_(0, order[best_CE], True)
        return taken[scope.mine(len(score_TE))]


class CausalExpertChoiceGate(ExpertChoiceGate):
    """Each expert takes every token whose score passes its threshold.

    The threshold follows the score above which C / T = capacity_factor · k / E of the global batch's tokens
    lay, one step behind: after each step the logarithm of the threshold moves by a tenth towards that
    quantile, read from a histogram over the global batch. So a token's experts depend on that token and on
    earlier *steps* alone: nothing leaks from later tokens, and generation routes as training did. The price:
    a micro-batch's load is balanced on average only. Before the first step, every token takes its k best
    experts. In the manner of the causal variants of expert choice; no paper fixes one.

    Args:
        hidden, experts, top_k, capacity_factor, z_loss: see `ExpertChoiceGate`.
        bins: bins of the histogram, of equal ratio over scores from 2^−OCTAVES to 1.

    Buffers:
        threshold_E: float32 [E], −1 before the first step.
    """

    OCTAVES, PACE = 16, 0.1
    """Range of the histogram; share of one step in the threshold."""

    threshold_E: Tensor

    def __init__(
        self, hidden: int, experts: int, top_k: int, capacity_factor: float = 1.0, z_loss: float = 0.0, *, bins: int
    ):
        super().__init__(hidden, experts, top_k, capacity_factor, z_loss)
        self.bins = bins
        self.register_buffer("threshold_E", torch.full((experts,), -1.0))
        self.histogram_EB: Tensor | None = None

    def reset_state(self) -> None:
        self.threshold_E.fill_(-1.0)

    def statistics(self, score_TE: Tensor) -> Tensor | None:
        return self._counts(score_TE) if self.training else None

    def count(self, counted: Tensor) -> None:
        """Add a pass's histograms, `counted` [E, bins], to the step's statistics."""
        self.histogram_EB = counted if self.histogram_EB is None else self.histogram_EB + counted

    def taken(self, score_TE: Tensor, tokens: Tokens, scope: MicroBatch) -> Tensor:
        best_Tk = score_TE.topk(self.top_k).indices
        best_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter_(1, best_Tk, True)
        taken_TE = torch.where(self.threshold_E < 0, best_TE, score_TE > self.threshold_E)
        return taken_TE if tokens.real_T is None else taken_TE & tokens.real_T[:, None]

    def _counts(self, score_TE: Tensor) -> Tensor:
        """Tokens per expert and bin: int64 [E, bins]."""
        # NaN is in no bin, and its step counts for nothing.
        place = ((score_TE.log2() / self.OCTAVES + 1) * self.bins).nan_to_num(0.0).clamp(0, self.bins - 1).long()
        row = torch.arange(self.experts, device=score_TE.device) * self.bins
        return occurrences(place + row, self.experts * self.bins).view(-1, self.bins)

    def step_statistics(self) -> Tensor:
        found, self.histogram_EB = self.histogram_EB, None
        if found is None:
            return self.threshold_E.new_zeros(self.experts * self.bins)
        return found.flatten()

    def skip_step(self) -> None:
        self.histogram_EB = None

    def after_step(self, total: Tensor) -> None:
        """Move the thresholds by the step's histograms, `total` [E · bins]."""
        passed = self._quantile(total.view(self.experts, self.bins).double())
        old = self.threshold_E.double()
        moved = torch.exp2(old.clamp(min=NONE).log2().lerp(passed.log2(), self.PACE))
        self.threshold_E.copy_(torch.where(old < 0, passed, moved))

    def _quantile(self, count_EB: Tensor) -> Tensor:
        """The score that the wanted share of tokens exceeds, linear in its logarithm inside a bin: [E]."""
        share = self.capacity_factor * self.top_k / self.experts
        if share >= 1:
            return torch.full_like(count_EB[:, 0], NONE)
        below_EB = count_EB.cumsum(1)
        wanted_E1 = (1 - share) * below_EB[:, -1:]
        bin_E1 = torch.searchsorted(below_EB, wanted_E1).clamp(max=self.bins - 1)
        inside_E1 = count_EB.gather(1, bin_E1)
        part = (wanted_E1 - below_EB.gather(1, bin_E1) + inside_E1) / inside_E1.clamp(min=1)
        return torch.exp2(((bin_E1 + part) / self.bins - 1) * self.OCTAVES).squeeze(1)
