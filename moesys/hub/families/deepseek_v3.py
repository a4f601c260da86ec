"""DeepSeek-V3 and R1 (DeepSeek 2024, arXiv 2412.19437), Moonlight and Kimi-K2 (Moonshot AI 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesys.hub.deepseek import EXPERTS, LATENT, LATENT_ALWAYS, SigmoidMoE, rotary_rows
from moesys.hub.keys import with_defaults
from moesys.models.parts.mixer import Mixer

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class DeepSeekV3(SigmoidMoE):
    """Latent attention; sigmoids with a bias for selection."""

    kind = "deepseek_v3"
    also = ("kimi_k2",)
    summary = "DeepSeek-V3"
    architecture = "DeepseekV3ForCausalLM"
    released = ("DeepSeek-V3", "DeepSeek-R1", "Moonlight-16B-A3B", "Kimi-K2")
    fields = (
        *LATENT,
        *with_defaults(
            EXPERTS,
            intermediate_size=18432,
            n_routed_experts=256,
            num_experts_per_tok=8,
            routed_scaling_factor=2.5,
        ),
    )
    always = {**LATENT_ALWAYS, **SigmoidMoE.always}
    only = {"hidden_act": "silu", "attention_bias": False, "rope_interleave": True}
    ignored = frozenset({"num_key_value_heads", "head_dim"})
    defaults = {"first_k_dense_replace": 3, "n_shared_experts": 1, "n_group": 8, "topk_group": 4}
    predicts = True

    def rows(self, inner: str, mixer: Mixer) -> tuple[int, ...] | None:
        """Rotary pairs."""
        return rotary_rows(inner, mixer)

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Also the heads of keys, as many as of queries."""
        super().write_more(model, raw)
        raw["num_key_value_heads"] = raw["num_attention_heads"]
