"""Phi-3.5-MoE (Microsoft 2024, arXiv 2404.14219)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, sqrt
from typing import TYPE_CHECKING, Any

from moesys.hub import blocks
from moesys.hub.derived import Derived
from moesys.hub.experts import PerExpert
from moesys.hub.family import Family
from moesys.hub.keys import GROUPED, REQUIRED, Key, with_defaults
from moesys.hub.rotary import Rotary

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Phimoe(Family):
    """Two experts by SparseMixer, whose weights are not shares of one sum; LayerNorm; LongRoPE."""

    kind = "phimoe"
    summary = "Phi-3.5-MoE"
    architecture = "PhimoeForCausalLM"
    released = ("Phi-3.5-MoE-instruct",)
    fields = (
        *with_defaults(GROUPED, rms_norm_eps=1e-5, num_key_value_heads=8),
        Key("attention_bias", "attention.bias", False),
        Key("lm_head_bias", "head_bias", False),
        Key("intermediate_size", "moe.ffn_hidden", REQUIRED),
        Key("num_local_experts", "moe.experts", 16),
        Key("router_jitter_noise", "moe.gate.threshold", 0.01),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
    )
    always = {"norm": "layer", "moe.gate.kind": "sparsemixer", "moe.top_k": 2}
    only = {"hidden_act": "silu", "num_experts_per_tok": 2}
    ignored = frozenset({"input_jitter_noise", "hidden_dropout"})
    names = {"ffn.gate.projection.weight": "block_sparse_moe.gate.weight"}
    experts = PerExpert("block_sparse_moe.experts.{expert}.", "w1", "w3", "w2")
    rotary = Rotary(theta=1000000.0)

    def windows(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[int | None]:
        """The same for every block."""
        found.read.add("sliding_window")
        return [raw.get("sliding_window") or None] * depth

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Noise of training that is left out."""
        if raw.get("input_jitter_noise"):
            found.notes.append(f"input_jitter_noise({raw['input_jitter_noise']}) of training is left out")

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """The window, and LongRoPE's factors on cosines and sines, which transformers needs."""
        raw["sliding_window"] = blocks.windows(model)[0]
        scaling = model.rope_scaling
        if scaling is not None and scaling.kind == "longrope":
            given = scaling.attention_factor or sqrt(1 + log(scaling.factor or 1) / log(scaling.original_seq_len or 2))
            factors = {"short_mscale": scaling.short_mscale or given, "long_mscale": scaling.long_mscale or given}
            raw["rope_scaling"] |= factors
            raw["rope_parameters"] |= factors
