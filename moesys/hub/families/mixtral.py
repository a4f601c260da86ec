"""Mixtral (Mistral AI 2024, arXiv 2401.04088)."""

from __future__ import annotations

from moesys.hub.experts import PerExpert
from moesys.hub.family import GROUPED, REQUIRED, Family, Key


class Mixtral(Family):
    """Softmax over the two chosen experts of eight; every block is MoE."""

    kind = "mixtral"
    summary = "Mixtral"
    architecture = "MixtralForCausalLM"
    released = ("Mixtral-8x7B", "Mixtral-8x22B")
    fields = (
        *GROUPED,
        Key("sliding_window", "attention.window", nullable=True),
        Key("intermediate_size", "moe.ffn_hidden", REQUIRED),
        Key("num_local_experts", "moe.experts", 8),
        Key("num_experts_per_tok", "moe.top_k", 2),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
        Key("router_jitter_noise", "moe.gate.jitter", 0.0),
    )
    always = {"moe.normalize": True}
    names = {"ffn.gate.projection.weight": "block_sparse_moe.gate.weight"}
    experts = PerExpert("block_sparse_moe.experts.{expert}.", "w1", "w3", "w2")
