"""Auxiliary losses of gates. T tokens, E experts, k choices per token; all arithmetic float32 or wider.

Every function returns this device's *share* of a loss over the micro-batch: the sum over the devices that
hold the micro-batch is the loss, and so is the sum of the shares' gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.moe.routing import MicroBatch

LEAST_WIDTH = 1e-6
"""Least width of noise from which probabilities are computed."""

Adjust = Callable[[Tensor], Tensor]
"""Changes the shares f [..., E] of assignments before they are multiplied with probabilities."""


def load_balancing(
    probabilities_TE: Tensor, load_E: Tensor, top_k: int, scope: MicroBatch, adjust: Adjust | None = None
) -> Tensor:
    """`E · Σ_e f_e · P_e` over the micro-batch (Switch Transformers, arXiv 2101.03961; GShard).

    `f_e` is the share of the micro-batch's assignments, `top_k` of each token, that are expert e's before any
    drop, `P_e` the mean of e's gate probability over the micro-batch. `load_E` are this device's counts.
    The minimum, at perfect balance, is 1.
    """
    tokens = probabilities_TE.shape[0] * scope.size
    f_E = scope.sum(load_E.to(probabilities_TE.dtype)) / (tokens * top_k)
    return _balance(f_E, probabilities_TE.sum(0), tokens, adjust)


def sequence_balancing(
    probabilities_TE: Tensor, expert_Tk: Tensor, sequences: int, scope: MicroBatch, adjust: Adjust | None = None
) -> Tensor:
    """The mean over sequences of `E · Σ_e f_e · P_e`, f and P of one sequence (DeepSeek-V2, arXiv 2405.04434).

    Tokens lie in `sequences` equal runs, this device's parts of the micro-batch's sequences.
    """
    tokens, experts = probabilities_TE.shape
    length = tokens // sequences * scope.size
    chosen = expert_Tk.reshape(sequences, -1)
    load_SE = chosen.new_zeros(sequences, experts).scatter_add_(1, chosen, torch.ones_like(chosen))
    f_SE = scope.sum(load_SE.to(probabilities_TE.dtype)) / (length * expert_Tk.shape[1])
    total_SE = probabilities_TE.view(sequences, -1, experts).sum(1)
    return _balance(f_SE, total_SE, length * sequences, adjust)


def global_balancing(
    probabilities_TE: Tensor, load_E: Tensor, scope: MicroBatch, adjust: Adjust | None = None
) -> Tensor:
    """`E · Σ_e f_e · P_e` with f of the global batch (arXiv 2501.11873), P of this micro-batch.

    `load_E` counts the whole global batch. The mean over its micro-batches has P of the global batch too.
    """
    f_E = load_E.to(probabilities_TE.dtype) / load_E.sum()
    return _balance(f_E, probabilities_TE.sum(0), probabilities_TE.shape[0] * scope.size, adjust)


def _balance(f: Tensor, total: Tensor, tokens: int, adjust: Adjust | None) -> Tensor:
    """Σ f · total · E / tokens; constants are multiplied first, so that autograd skips them."""
    f = f if adjust is None else adjust(f)
    return torch.dot((f * (total.shape[-1] / tokens)).flatten(), total.flatten())


def router_z(logits_TE: Tensor, scope: MicroBatch) -> Tensor:
    """`mean_t (logsumexp_e logits)²` (ST-MoE, arXiv 2202.08906)."""
    return logits_TE.logsumexp(-1).square().sum() / (logits_TE.shape[0] * scope.size)


def importance(weight_Tk: Tensor, expert_Tk: Tensor, experts: int, scope: MicroBatch) -> Tensor:
    """CV² of the experts' importance, the sum of their weights (Shazeer et al. 2017, arXiv 1701.06538)."""
    part_E = weight_Tk.new_zeros(experts).scatter_add(0, expert_Tk.flatten(), weight_Tk.flatten())
    return _variation(part_E, scope)


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, width_TE: Tensor, top_k: int, scope: MicroBatch) -> Tensor:
    """CV² of the experts' smooth load (Shazeer et al. 2017, appendix A).

    An expert's load is the sum over tokens of the probability that it were among the k best if its own
    noise alone were drawn again: Φ((clean − the k-th best noisy logit of the others) / width). All float
    [T, E], k < E; the loads' expectation is the number of tokens.
    """
    best = noisy_TE.topk(top_k + 1).values
    inside = noisy_TE > best[:, top_k:]
    threshold_TE = torch.where(inside, best[:, top_k:], best[:, top_k - 1 : top_k])
    # Below the least width a chance is 0 or 1 in any case, and its slope 0 / 0.
    return _variation(torch.special.ndtr((clean_TE - threshold_TE) / width_TE.clamp(min=LEAST_WIDTH)).sum(0), scope)


def _variation(part_E: Tensor, scope: MicroBatch) -> Tensor:
    """Share of CV² = variance / mean² of the sums over devices of `part_E`.

    Not a sum over tokens, but its first-order expansion at the sum is: that has the gradient, and as CV²
    does not change with the scale, its value over all devices is 0.
    """
    whole_E = scope.sum(part_E.detach())
    total, squares = whole_E.sum(), whole_E.square().sum()
    value = len(whole_E) * squares / total.square() - 1
    slope_E = 2 * len(whole_E) * (whole_E / total.square() - squares / total**3)
    return (slope_E * part_E).sum() + value / scope.size


@dataclass(frozen=True)
class LossInputs:
    """Inputs of the losses, of one device's tokens.

    Attributes:
        logits_TE: without noise.
        probabilities_TE: gate probabilities; they sum to 1 over a token's experts.
        expert_Tk, weight_Tk: the chosen experts and their weights, before any drop.
        counted_Tc: the experts of each token that balance losses count.
        load_E: how often each expert is among them.
        sequences: number of equal runs of tokens, one for each sequence.
        global_load_E: `load_E` of the whole global batch, where a loss needs it.
        noisy_TE, width_TE: logits with noise and its width, where there is noise.
    """

    logits_TE: Tensor
    probabilities_TE: Tensor
    expert_Tk: Tensor
    weight_Tk: Tensor
    counted_Tc: Tensor
    load_E: Tensor
    sequences: int = 1
    global_load_E: Tensor | None = None
    noisy_TE: Tensor | None = None
    width_TE: Tensor | None = None


@dataclass(frozen=True)
class Balance:
    """Coefficients of the losses that a gate adds, by their names; 0 turns one off. Any may be on together."""

    balance: float = 0.0
    sequence_balance: float = 0.0
    global_balance: float = 0.0
    z: float = 0.0
    importance: float = 0.0
    load_loss: float = 0.0

    def shares(self, inputs: LossInputs, scope: MicroBatch, adjust: Adjust | None = None) -> dict[str, Tensor]:
        """This device's share of each loss that is on, coefficient included."""
        p, found = inputs.probabilities_TE, {}
        if self.balance:
            found["balance"] = load_balancing(p, inputs.load_E, inputs.counted_Tc.shape[1], scope, adjust)
        if self.sequence_balance:
            found["sequence_balance"] = sequence_balancing(p, inputs.counted_Tc, inputs.sequences, scope, adjust)
        if self.global_balance and inputs.global_load_E is not None:
            found["global_balance"] = global_balancing(p, inputs.global_load_E, scope, adjust)
        if self.z:
            found["z"] = router_z(inputs.logits_TE, scope)
        if self.importance:
            found["importance"] = importance(inputs.weight_Tk, inputs.expert_Tk, p.shape[1], scope)
        if self.load_loss and inputs.noisy_TE is not None and inputs.width_TE is not None:
            k = inputs.expert_Tk.shape[1]
            found["load_loss"] = smooth_load(inputs.logits_TE, inputs.noisy_TE, inputs.width_TE, k, scope)
        return {name: getattr(self, name) * loss for name, loss in found.items()}
