"""Qwen3-MoE (Qwen 2025, arXiv 2505.09388)."""

from __future__ import annotations

from moesys.hub.keys import GROUPED, REQUIRED, Key, with_defaults
from moesys.hub.qwen import Qwen


class Qwen3Moe(Qwen):
    """128 experts, a norm of each head's query and key."""

    kind = "qwen3_moe"
    summary = "Qwen3-MoE"
    architecture = "Qwen3MoeForCausalLM"
    released = ("Qwen3-30B-A3B", "Qwen3-235B-A22B")
    fields = (
        *with_defaults(GROUPED, num_key_value_heads=4),
        Key("attention_bias", "attention.bias", False),
        Key("intermediate_size", "ffn_hidden", 6144),
        Key("moe_intermediate_size", "moe.ffn_hidden", REQUIRED),
        # Released files say num_experts; transformers 5 writes the other name.
        Key("num_experts", "moe.experts", 128, also=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.top_k", 8),
        Key("norm_topk_prob", "moe.normalize", False),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
    )
    always = {"attention.qk_norm": "head"}
    windowed = "all"
