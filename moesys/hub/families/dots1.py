"""dots.llm1 (rednote-hilab 2025, arXiv 2506.05767)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesys.hub import layer_types
from moesys.hub.deepseek import EXPERTS, SigmoidMoE
from moesys.hub.derived import Derived
from moesys.hub.keys import GROUPED, Key, with_defaults

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Dots1(SigmoidMoE):
    """DeepSeek-V3's gate; grouped-query attention with a norm of each head's query and key."""

    kind = "dots1"
    summary = "dots.llm1"
    architecture = "Dots1ForCausalLM"
    released = ("dots.llm1.inst", "dots.llm1.base")
    fields = (
        *with_defaults(GROUPED, num_key_value_heads=32),
        Key("attention_bias", "attention.bias", False),
        *with_defaults(EXPERTS, norm_topk_prob=False),
    )
    always = {**SigmoidMoE.always, "attention.qk_norm": "head"}
    only = {"hidden_act": "silu"}
    defaults = {"n_group": 1, "topk_group": 1}

    def windows(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[int | None]:
        """By `layer_types`, else from block `max_window_layers` on."""
        first = raw.get("max_window_layers", 62)
        return layer_types.read(
            raw, found, 4096, ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
        )

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Also windows."""
        super().write_more(model, raw)
        layer_types.write(model, raw)
