"""Auxiliary losses of the gate. T tokens, E experts, k choices per token; all arithmetic float32."""

from __future__ import annotations

from torch import Tensor

from moesys.moe.routing import MicroBatch


def load_balancing(probabilities_TE: Tensor, load_E: Tensor, top_k: int, scope: MicroBatch) -> Tensor:
    """This device's share of `E · Σ_e f_e · P_e` (Switch Transformers, arXiv 2101.03961; GShard).

    `f_e` is the share of the micro-batch's T·k assignments that went to expert e before any drop,
    `P_e` the mean of e's gate probability over the micro-batch. `load_E` are this device's counts.
    The minimum, at perfect balance, is 1.
    """
    tokens = probabilities_TE.shape[0] * scope.size
    experts = probabilities_TE.shape[1]
    f_E = scope.sum(load_E.to(probabilities_TE.dtype)) / (tokens * top_k)
    return experts * (f_E * (probabilities_TE.sum(0) / tokens)).sum()


def router_z(logits_TE: Tensor, scope: MicroBatch) -> Tensor:
    """This device's share of `mean_t (logsumexp_e logits)²` (ST-MoE, arXiv 2202.08906)."""
    return logits_TE.logsumexp(-1).square().sum() / (logits_TE.shape[0] * scope.size)
