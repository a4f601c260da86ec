"""ERNIE-4.5 with experts, its language models (Baidu 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesys.hub.derived import Derived
from moesys.hub.family import Family
from moesys.hub.keys import GROUPED, REQUIRED, Key, with_defaults
from moesys.hub.mapping import halves_from_pairs
from moesys.hub.rotary import Rotary
from moesys.models.parts.mixer import Mixer

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Ernie4_5Moe(Family):
    """Softmax with a bias for selection, in float32; rotary positions turn neighbouring elements."""

    kind = "ernie4_5_moe"
    summary = "ERNIE-4.5"
    architecture = "Ernie4_5_MoeForCausalLM"
    released = ("ERNIE-4.5-21B-A3B", "ERNIE-4.5-300B-A47B")
    fields = (
        *with_defaults(GROUPED, rms_norm_eps=1e-5, tie_word_embeddings=True, num_key_value_heads=4),
        Key("intermediate_size", "ffn_hidden", 12288),
        Key("moe_intermediate_size", "moe.ffn_hidden", REQUIRED),
        Key("moe_num_experts", "moe.experts", 64),
        Key("moe_k", "moe.top_k", 6),
        Key("moe_norm_min", "moe.normalize_min", 1e-12),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
    )
    always = {"moe.normalize": True, "moe.selection_bias": True}
    only = {"hidden_act": "silu", "use_bias": False, "moe_gate": "topk", "moe_use_aux_free": True}
    ignored = frozenset({"moe_capacity", "num_nextn_predict_layers", "moe_aux_loss_lambda", "moe_dropout_prob"})
    names = {"ffn.gate.selection_bias": "mlp.moe_statics.e_score_correction_bias"}
    float32 = frozenset({"ffn.gate.selection_bias", "ffn.gate.projection.weight"})
    left_out = (*Family.left_out, r"model\.mtp_.*")
    rotary = Rotary(theta=500000.0)

    def moe_blocks(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[bool]:
        """Every `moe_layer_interval`-th between two numbers."""
        found.read |= {"moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"}
        start, end = raw.get("moe_layer_start_index", 1), raw.get("moe_layer_end_index", -1)
        step = raw.get("moe_layer_interval", 1)
        end = depth - 1 if end == -1 else end
        return [(layer + 1) % step == 0 and start <= layer <= end for layer in range(depth)]

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Shared experts."""
        self.require(raw, found, "use_rmsnorm", True)
        found.read.add("moe_num_shared_experts")
        if shared := raw.get("moe_num_shared_experts", 2):
            found.values["moe.shared_experts"] = shared
        if raw.get("num_nextn_predict_layers"):
            found.notes.append("its block of multi-token prediction is left out: transformers has none for this family")

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Blocks and shared experts, back."""
        if (m := model.moe) is None:
            return
        of_moe = [layer for layer in model.moe_blocks if layer < model.depth]
        step = of_moe[1] - of_moe[0] if len(of_moe) > 1 else 1
        raw |= {"moe_layer_start_index": of_moe[0], "moe_layer_end_index": of_moe[-1], "moe_layer_interval": step}
        raw["moe_num_shared_experts"] = m.shared_width // m.ffn_hidden

    def rows(self, inner: str, mixer: Mixer) -> tuple[int, ...] | None:
        """Rotary pairs."""
        heads = {"attention.q_proj.weight": 0, "attention.k_proj.weight": 1}.get(inner)
        return None if heads is None else halves_from_pairs(mixer.head_sizes()[heads], mixer.head_sizes()[2])

    def leading(self, inner: str) -> int:
        """The bias for selection is [1, E]."""
        return int(inner == "ffn.gate.selection_bias")
