"""Qwen1.5-MoE and Qwen2-MoE (Qwen 2024, arXiv 2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesys.hub.derived import Derived
from moesys.hub.keys import GROUPED, REQUIRED, Key, with_defaults
from moesys.hub.qwen import Qwen

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Qwen2Moe(Qwen):
    """A shared expert with a gate of its own beside the routed ones; biases on queries, keys and values."""

    kind = "qwen2_moe"
    summary = "Qwen2-MoE"
    architecture = "Qwen2MoeForCausalLM"
    released = ("Qwen1.5-MoE-A2.7B", "Qwen2-57B-A14B")
    fields = (
        *with_defaults(GROUPED, num_key_value_heads=16),
        Key("intermediate_size", "ffn_hidden", 5632),
        Key("moe_intermediate_size", "moe.ffn_hidden", REQUIRED),
        Key("shared_expert_intermediate_size", "moe.shared_ffn_hidden", 5632),
        Key("num_experts", "moe.experts", 60),
        Key("num_experts_per_tok", "moe.top_k", 4),
        Key("norm_topk_prob", "moe.normalize", False),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
    )
    always = {"moe.shared_experts": 1, "moe.shared_mix": "gate"}
    names = {
        **{f"ffn.shared.{m}_proj.weight": f"mlp.shared_expert.{m}_proj.weight" for m in ("gate", "up", "down")},
        "ffn.mix.projection.weight": "mlp.shared_expert_gate.weight",
    }
    windowed = "turns"

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Biases."""
        found.read.add("qkv_bias")
        found.values["attention.bias"] = "qkv" if raw.get("qkv_bias", True) else False

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Also biases."""
        super().write_more(model, raw)
        raw["qkv_bias"] = bool(model.mixer(0)[0].bias)
