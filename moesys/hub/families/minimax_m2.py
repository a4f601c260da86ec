"""MiniMax-M2 (MiniMax 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesys.hub.derived import Derived
from moesys.hub.experts import PerExpert
from moesys.hub.family import Family
from moesys.hub.keys import GROUPED, REQUIRED, Key, with_defaults
from moesys.hub.rotary import Rotary


class MiniMaxM2(Family):
    """256 experts by sigmoids with a bias for selection; norms of queries and keys over all heads; released in FP8."""

    kind = "minimax_m2"
    summary = "MiniMax-M2"
    architecture = "MiniMaxM2ForCausalLM"
    released = ("MiniMax-M2",)
    fields = (
        *with_defaults(GROUPED, head_dim=128, num_key_value_heads=8),
        Key("intermediate_size", "moe.ffn_hidden", REQUIRED),
        Key("num_local_experts", "moe.experts", 256),
        Key("num_experts_per_tok", "moe.top_k", 8),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
        Key("router_jitter_noise", "moe.gate.jitter", 0.0),
    )
    always = {
        "attention.qk_norm": "full",
        "moe.gate.score": "sigmoid",
        "moe.normalize": True,
        "moe.selection_bias": True,
    }
    only = {
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_routing_bias": True,
    }
    ignored = frozenset(
        {"mlp_intermediate_size", "shared_moe_mode", "num_mtp_modules", "mtp_transformer_layers", "swa_rope_theta"}
    )
    names = {
        "ffn.gate.projection.weight": "block_sparse_moe.gate.weight",
        "ffn.gate.selection_bias": "block_sparse_moe.e_score_correction_bias",
    }
    experts = PerExpert("block_sparse_moe.experts.{expert}.", "w1", "w3", "w2")
    float32 = frozenset({"ffn.gate.selection_bias"})
    rotary = Rotary(theta=5000000.0, share=1.0)

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Kinds of attention by block, and multi-token prediction, which files lack."""
        found.read |= {"attn_type_list", "use_mtp"}
        for part in ("full_attention", "linear_attention", "mlp"):
            for factor in ("alpha", "beta"):
                self.require(raw, found, f"layernorm_{part}_{factor}", 1.0)
        if any(kind != 1 for kind in raw.get("attn_type_list") or ()):
            found.refuse("attn_type_list", "has kinds of attention beside 1, the softmax")
        if raw.get("use_mtp"):
            found.notes.append("config.json names multi-token prediction, and released files have no blocks of it")
