"""OLMoE (Allen Institute for AI 2024, arXiv 2409.02060)."""

from __future__ import annotations

from moesys.hub.family import Family
from moesys.hub.keys import GROUPED, REQUIRED, Key, with_defaults


class Olmoe(Family):
    """64 small experts, norms of queries and keys over all heads."""

    kind = "olmoe"
    summary = "OLMoE"
    architecture = "OlmoeForCausalLM"
    released = ("OLMoE-1B-7B",)
    fields = (
        *with_defaults(GROUPED, rms_norm_eps=1e-5),
        Key("attention_bias", "attention.bias", False),
        Key("clip_qkv", "attention.clip_qkv"),
        Key("intermediate_size", "moe.ffn_hidden", REQUIRED),
        Key("num_experts", "moe.experts", 64),
        Key("num_experts_per_tok", "moe.top_k", 8),
        Key("norm_topk_prob", "moe.normalize", False),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.01),
    )
    always = {"attention.qk_norm": "full"}
