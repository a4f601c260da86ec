"""GPT-OSS (OpenAI 2025, arXiv 2508.10925)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesys.hub import layer_types
from moesys.hub.derived import Derived
from moesys.hub.experts import ALTERNATING, Fused
from moesys.hub.family import Family
from moesys.hub.keys import GROUPED, REQUIRED, Key, with_defaults
from moesys.hub.rotary import Rotary

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class GptOss(Family):
    """Sinks and windows in attention, biases everywhere, softmax over the chosen experts alone; MXFP4 or bfloat16."""

    kind = "gpt_oss"
    summary = "GPT-OSS"
    architecture = "GptOssForCausalLM"
    released = ("gpt-oss-20b", "gpt-oss-120b")
    fields = (
        *with_defaults(GROUPED, rms_norm_eps=1e-5, head_dim=64, num_key_value_heads=8),
        Key("attention_bias", "attention.bias", True),
        Key("intermediate_size", "moe.ffn_hidden", REQUIRED),
        Key("num_local_experts", "moe.experts", 128),
        Key("num_experts_per_tok", "moe.top_k", 4, also=("experts_per_token",)),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
    )
    always = {
        "attention.sinks": True,
        "moe.activation": "clipped_swiglu",
        "moe.bias": True,
        "moe.gate.bias": True,
        "moe.normalize": True,
    }
    only = {"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    ignored = frozenset({"initial_context_length"})
    names = {f"ffn.gate.projection.{p}": f"mlp.router.{p}" for p in ("weight", "bias")}
    experts = Fused(
        {
            "fc1": "mlp.experts.gate_up_proj",
            "fc2": "mlp.experts.down_proj",
            "fc1_bias": "mlp.experts.gate_up_proj_bias",
            "fc2_bias": "mlp.experts.down_proj_bias",
        },
        ALTERNATING,
    )
    rotary = Rotary(
        theta=150000.0,
        scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    )

    def windows(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[int | None]:
        """By `layer_types`, else of every second block, from the first."""
        return layer_types.read(
            raw, found, 128, [layer_types.FULL if i % 2 else layer_types.SLIDING for i in range(depth)]
        )

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Windows."""
        layer_types.write(model, raw)
