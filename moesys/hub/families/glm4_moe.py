"""GLM-4.5, GLM-4.5-Air and GLM-4.6 (Zhipu AI 2025, arXiv 2508.06471)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesys.hub.deepseek import EXPERTS, SigmoidMoE
from moesys.hub.derived import Derived
from moesys.hub.keys import GROUPED, with_defaults
from moesys.hub.rotary import Rotary

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Glm4Moe(SigmoidMoE):
    """DeepSeek-V3's gate; grouped-query attention with biases, half of each head turned."""

    kind = "glm4_moe"
    summary = "GLM-4.5"
    architecture = "Glm4MoeForCausalLM"
    released = ("GLM-4.5", "GLM-4.5-Air", "GLM-4.6")
    fields = (*with_defaults(GROUPED, rms_norm_eps=1e-5, num_key_value_heads=8), *EXPERTS)
    only = {"hidden_act": "silu"}
    defaults = {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    rotary = Rotary(share=0.5)
    predicts = True

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Also biases and norms of queries and keys."""
        super().more(raw, found)
        found.read |= {"attention_bias", "use_qk_norm"}
        found.values["attention.bias"] = "qkv" if raw.get("attention_bias") else False
        found.values["attention.qk_norm"] = "head" if raw.get("use_qk_norm") else "none"

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Also biases and norms of queries and keys."""
        super().write_more(model, raw)
        a = model.mixer(0)[0]
        raw |= {"attention_bias": bool(a.bias), "use_qk_norm": a.qk_norm != "none"}
