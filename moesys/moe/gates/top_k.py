"""Token choice: each token goes to its k best experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from moesys.kernels.gate import GateResult, Score, best, gate, weigh
from moesys.moe import noise
from moesys.moe.capacity import Capacity, TopKChoice, assign
from moesys.moe.counts import occurrences
from moesys.moe.gates.gate import Gate
from moesys.moe.gates.projection import GateProjection as GateProjection
from moesys.moe.losses import Balance, LossInputs
from moesys.moe.routing import MicroBatch, Routing, Tokens
from moesys.moe.zero import ZeroRule

Counts = Literal["chosen", "scores", "first"]


@dataclass(frozen=True)
class Groups:
    """Choice limited to groups of experts: E experts in `count` equal groups of which a token uses `kept`.

    A group is as good as its best expert ("max", DeepSeek-V2, arXiv 2405.04434) or as the sum of its two
    best ("top2", DeepSeek-V3, arXiv 2412.19437).
    """

    count: int
    kept: int
    score: Literal["max", "top2"] = "max"

    def limit(self, scores_TE: Tensor) -> Tensor:
        """The scores, -inf for experts of groups that are not kept; of equal groups the first are."""
        grouped_TGE = scores_TE.unflatten(-1, (self.count, -1))
        group_TG = grouped_TGE.topk(2 if self.score == "top2" else 1, dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(-1, best(group_TG, self.kept), True)
        return grouped_TGE.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(-2)


@dataclass(frozen=True)
class Randomness:
    """Randomness in training, drawn by the tokens' numbers; evaluation is deterministic.

    Attributes:
        gaussian: add N(0, 1) · softplus(x · W_noiseᵀ) to the logits (Shazeer et al. 2017, arXiv 1701.06538).
        jitter: multiply the gate's input, element by element, by uniform numbers from 1 ± jitter (Switch).
        second: keep the second of two experts with probability min(1, 2·g), g its share of the weights
            (GShard, arXiv 2006.16668); the first one's weight is the same in either case.
        layer: makes the numbers differ between layers.
        keys: keys of the random numbers, by purpose.
    """

    gaussian: bool = False
    jitter: float = 0.0
    second: bool = False
    layer: int = 0
    keys: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Hashed here: `torch.compile` does not trace the hash.
        keys = {purpose: noise.key(self.layer, purpose) for purpose in ("jitter", "noise", "second")}
        object.__setattr__(self, "keys", keys)

    def shake(self, x_TH: Tensor, number_T: Tensor) -> Tensor:
        """Tokens times uniform numbers from 1 ± jitter (Switch, arXiv 2101.03961)."""
        factor_TH = noise.uniform(number_T, x_TH.shape[1], self.keys["jitter"])
        return x_TH * (1 + self.jitter * (2 * factor_TH - 1))

    def disturb(self, logits_TE: Tensor, width_TE: Tensor, number_T: Tensor) -> Tensor:
        """Logits with Gaussian noise of a width per token and expert (Shazeer et al. 2017)."""
        return logits_TE + width_TE * noise.normal(number_T, logits_TE.shape[1], self.keys["noise"])

    def kept(self, weight_T2: Tensor, number_T: Tensor) -> Tensor:
        """Mask of the choices that stay: bool [T, 2]."""
        share_T = weight_T2[:, 1] / (weight_T2.sum(-1) + 1e-20)
        drawn_T = noise.uniform(number_T, 1, self.keys["second"]).squeeze(-1)
        return torch.stack([torch.ones_like(drawn_T, dtype=torch.bool), drawn_T < 2 * share_T], -1)


class TopKGate(Gate):
    """Scores of E experts, then the k largest: Shazeer et al. 2017, GShard, Switch, Mixtral, DeepSeek-V3.

    With a selection bias (loss-free balancing, arXiv 2408.15664; DeepSeek-V3), or with groups, the choice is
    by score + bias; weights are made of the scores alone. `selection_bias` is float32 whatever the model's
    type.

    Args:
        hidden: size of a token.
        experts: E.
        top_k: k, 1 ≤ k ≤ E.
        score: what makes logits scores. With "softmax" and `normalize` the weights are the softmax over the
            chosen logits alone.
        normalize: divide the k chosen scores by their sum.
        scale: factor on the weights, after normalisation.
        bias_rate: u of the selection bias, which after each step grows by u · sign(mean load − load), loads
            of the global batch before drops; 0: it stays as it is.
        selection_bias: whether there is one although `bias_rate` is 0.
        least_sum: what the k chosen scores are divided by at least, to normalise them (ERNIE-4.5: moe_norm_min).
        groups: see `Groups`; None for no limit.
        randomness: see `Randomness`.
        capacity: see `moesys.moe.capacity`. Weights are normalised before dropping; a dropped assignment's
            share is lost.
        balance: the losses, in training. They see what was routed by, noise included; z sees no noise.
        counts: the assignments whose shares f are in balance losses. "chosen": each token's k experts, bias and
            groups included, before any drop; "scores": the k largest scores, without bias and groups (DeepSeek-V3,
            arXiv 2412.19437; Megatron-Core); "first": each token's first choice alone (GShard, arXiv 2006.16668;
            DeepSpeed).
        zero: the rule of zero-computation experts, which E then does not count; None without any.
        projection: from x to logits; default: a `GateProjection`.
    """

    selection_bias: Tensor

    def __init__(
        self,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        score: Score = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        bias_rate: float = 0.0,
        selection_bias: bool = False,
        least_sum: float = 0.0,
        groups: Groups | None = None,
        randomness: Randomness | None = None,
        capacity: Capacity | None = None,
        balance: Balance | None = None,
        counts: Counts = "chosen",
        zero: ZeroRule | None = None,
        projection: nn.Module | None = None,
    ):
        super().__init__()
        self.experts, self.top_k, self.zero = experts, top_k, zero
        self.candidates = experts + (zero.count if zero is not None else 0)
        self.score: Score = score
        self.normalize, self.scale, self.groups = normalize, scale, groups
        self.bias_rate, self.has_bias, self.least_sum = bias_rate, selection_bias or bias_rate > 0, least_sum
        self.randomness = randomness or Randomness()
        self.capacity, self.balance, self.counts = capacity or Capacity(), balance or Balance(), counts
        self.projection = projection or GateProjection(hidden, self.candidates)
        self.noise = GateProjection(hidden, self.candidates) if self.randomness.gaussian else None
        if self.has_bias:
            self.register_buffer("selection_bias", torch.zeros(self.candidates))
        self.counts_first = bool(self.balance.global_balance)
        self.load: Tensor | None = None
        """Counts int64 since the last step: the assignments of each expert for the bias, if there is one, then those
        for the global loss; None where neither needs them."""
        self.global_load: Tensor | None = None
        """Counts of the whole global batch for the global loss, where they were made before the step."""

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        logits_TE, noisy_TE, width_TE = self._logits(x_TH, tokens.number_T)
        chosen = self.choose(noisy_TE, tokens)
        counted_Tc = self._counted(chosen.expert_Tk, noisy_TE)
        counted_E = chosen.load_E if counted_Tc is chosen.expert_Tk else occurrences(counted_Tc, self.candidates)
        stays_Tk = self._stays(chosen.weight_Tk, tokens)
        if stays_Tk is not None:
            chosen = chosen._replace(load_E=occurrences(chosen.expert_Tk, self.candidates, stays_Tk))
        routing = self._route(chosen, stays_Tk, tokens, scope)
        routing.counted = self._counts(chosen.load_E, counted_E)
        if self.training and torch.is_grad_enabled():
            inputs = LossInputs(
                logits_TE,
                self._normalized(chosen.probabilities_TE),
                chosen.expert_Tk,
                chosen.weight_Tk,
                counted_Tc,
                counted_E,
                tokens.sequences,
                self._global_load(counted_E, scope),
                noisy_TE,
                width_TE,
            )
            routing.losses = self.balance.shares(inputs, scope, None if self.zero is None else self.zero.adjust)
        return routing

    def choose(self, logits_TE: Tensor, tokens: Tokens) -> GateResult:
        """Each token's experts, their weights, every expert's score and how often it was chosen."""
        if self.forced is not None:
            expert_Tk = self.forced(tokens)
        elif not self.has_bias and self.groups is None and self.zero is None and not self.least_sum:
            return gate(logits_TE, self.top_k, self.score, self.normalize, self.scale)
        else:
            expert_Tk = best(self._selection(logits_TE.detach()), self.top_k)
        if self.zero is None or self.zero.variant == "moe++" or not self.normalize:
            return weigh(logits_TE, expert_Tk, self.score, self.normalize, self.scale, self.least_sum)
        result = weigh(logits_TE, expert_Tk, self.score, normalize=False)
        return result._replace(weight_Tk=self.zero.weigh(result.weight_Tk, expert_Tk, self.scale))

    def _logits(self, x_TH: Tensor, number_T: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, the same with noise, and its width."""
        if self.training and self.randomness.jitter:
            x_TH = self.randomness.shake(x_TH, number_T)
        logits_TE = self.projection(x_TH)
        if self.noise is None:
            return logits_TE, logits_TE, None
        # In evaluation, too: sharded parameters are gathered in every pass or in none.
        width_TE = nn.functional.softplus(self.noise(x_TH))
        if not self.training:
            return logits_TE, logits_TE, None
        return logits_TE, self.randomness.disturb(logits_TE, width_TE, number_T), width_TE

    def _selection(self, logits_TE: Tensor) -> Tensor:
        """The scores by which the best experts are chosen."""
        if not self.has_bias and self.groups is None:
            return logits_TE
        scores_TE = logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()
        if self.has_bias:
            scores_TE = scores_TE + self.selection_bias
        return scores_TE if self.groups is None else self.groups.limit(scores_TE)

    def _normalized(self, probabilities_TE: Tensor) -> Tensor:
        """Probabilities that sum to 1, for the losses: of sigmoids as in DeepSeek-V3."""
        if self.score == "softmax":
            return probabilities_TE
        return probabilities_TE / (probabilities_TE.sum(-1, keepdim=True) + 1e-20)

    def _counted(self, expert_Tk: Tensor, logits_TE: Tensor) -> Tensor:
        """Each token's experts [T, c] that balance losses count."""
        if self.counts == "first":
            return expert_Tk[:, :1]
        return best(logits_TE, self.top_k) if self.counts == "scores" else expert_Tk

    def _stays(self, weight_Tk: Tensor, tokens: Tokens) -> Tensor | None:
        """Mask of the choices that are assignments, bool [T, k]; None for all of them."""
        if tokens.real_T is not None:
            return tokens.real_T[:, None].expand_as(weight_Tk)
        if not self.training or not self.randomness.second:
            return None
        return self.randomness.kept(weight_Tk.detach(), tokens.number_T)

    def _route(self, chosen: GateResult, stays_Tk: Tensor | None, tokens: Tokens, scope: MicroBatch) -> Routing:
        weight_Tk, expert_Tk, wanted_Tk = chosen.weight_Tk, chosen.expert_Tk, stays_Tk
        experts: float = self.experts
        if self.zero is not None:
            experts, computed_Tk = self.zero.places, expert_Tk < self.experts
            wanted_Tk = computed_Tk if stays_Tk is None else stays_Tk & computed_Tk
        count = 0 if self.capacity.unlimited(self.training) else tokens.count(scope)
        limit = self.capacity.limit(self.training, count, self.top_k, experts)
        choice = TopKChoice(expert_Tk, weight_Tk, chosen.probabilities_TE, wanted_Tk)
        rows = None
        if self.capacity.pad and limit is not None:
            # Shapes do not depend on padding.
            every = len(tokens.number_T) * scope.size
            rows = self.capacity.limit(self.training, every, self.top_k, experts)
        routing = assign(choice, tokens.number_T, self.experts, limit, self.capacity, scope, rows)
        routing.load_E = chosen.load_E[: self.experts]
        if self.zero is not None:
            routing.zero_TZ = self.zero.weights(weight_Tk if stays_Tk is None else weight_Tk * stays_Tk, expert_Tk)
            routing.zero_load = chosen.load_E[self.experts :].sum()
        return routing

    def _counts(self, load_E: Tensor, counted_E: Tensor) -> Tensor | None:
        wanted = [load_E] * bool(self.bias_rate) + [counted_E] * self.counts_first
        return torch.cat(wanted) if self.training and wanted else None

    def count(self, counted: Tensor) -> None:
        """Add a pass's assignments, `counted` [N], to the step's statistics."""
        self.load = counted + (0 if self.load is None else self.load)

    def _global_load(self, counted_E: Tensor, scope: MicroBatch) -> Tensor | None:
        if not self.balance.global_balance:
            return None
        return scope.sum_global(counted_E) if self.global_load is None else self.global_load

    def reset_state(self) -> None:
        if self.has_bias:
            self.selection_bias.zero_()

    def step_statistics(self) -> Tensor | None:
        return self.load

    def before_step(self, total: Tensor) -> None:
        """Take the global batch's load, `total` [N], for the balance loss."""
        self.global_load, self.load = total[-self.candidates :], None

    def skip_step(self) -> None:
        self.load = self.global_load = None

    def after_step(self, total: Tensor) -> None:
        """Move the selection bias by the step's load, `total` [N]."""
        self.skip_step()
        if self.bias_rate:
            load_E = total[: self.candidates]
            load_E = load_E if self.zero is None else self.zero.adjust(load_E)
            self.selection_bias += self.bias_rate * torch.sign(load_E.mean() - load_E).to(self.selection_bias.dtype)
