"""DeepSeek-V2 and V2-Lite (DeepSeek 2024, arXiv 2405.04434)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesys.hub.deepseek import EXPERTS, LATENT, LATENT_ALWAYS, DeepSeekMoE, rotary_rows
from moesys.hub.derived import Derived
from moesys.hub.keys import with_defaults
from moesys.models.parts.mixer import Mixer

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class DeepSeekV2(DeepSeekMoE):
    """Latent attention; softmax over all experts, chosen from the best groups in the large model."""

    kind = "deepseek_v2"
    summary = "DeepSeek-V2"
    architecture = "DeepseekV2ForCausalLM"
    released = ("DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek-Coder-V2")
    fields = (
        *LATENT,
        *(key for key in with_defaults(EXPERTS, intermediate_size=11008) if key.theirs != "norm_topk_prob"),
    )
    always = {**LATENT_ALWAYS, "moe.normalize": False}
    only = {"hidden_act": "silu", "attention_bias": False, "norm_topk_prob": False, "scoring_func": "softmax"}
    ignored = frozenset({"num_key_value_heads", "head_dim", "mlp_bias"})
    defaults = {"n_shared_experts": 2}
    group_score = "max"

    def rows(self, inner: str, mixer: Mixer) -> tuple[int, ...] | None:
        """Rotary pairs."""
        return rotary_rows(inner, mixer)

    def grouped(self, raw: Mapping[str, Any], found: Derived) -> bool:
        """As `topk_method` says."""
        self.require(raw, found, "topk_method", "greedy", "group_limited_greedy")
        return raw.get("topk_method") == "group_limited_greedy"

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Also how experts are chosen."""
        super().write_more(model, raw)
        grouped = model.moe is not None and model.moe.gate.groups > 1
        raw["topk_method"] = "group_limited_greedy" if grouped else "greedy"
        raw["num_key_value_heads"] = raw["num_attention_heads"]
