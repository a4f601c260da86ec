"""What files of DeepSeek's models and of those that follow them have in common. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from moesys.hub.derived import Derived
from moesys.hub.family import Family
from moesys.hub.keys import COMMON, REQUIRED, Key, with_defaults
from moesys.hub.mapping import halves_from_pairs
from moesys.models.parts.mixer import Mixer
from moesys.words import plural

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig

EXPERTS = (
    Key("intermediate_size", "ffn_hidden", 10944),
    Key("moe_intermediate_size", "moe.ffn_hidden", REQUIRED),
    Key("n_routed_experts", "moe.experts", REQUIRED),
    Key("num_experts_per_tok", "moe.top_k", REQUIRED),
    Key("norm_topk_prob", "moe.normalize", True),
    Key("routed_scaling_factor", "moe.scale", 1.0),
)
"""Keys of routed experts, with GLM-4.5's defaults."""
LATENT = (
    *with_defaults(COMMON, rms_norm_eps=1e-6),
    Key("q_lora_rank", "attention.q_lora_rank", 1536),
    Key("kv_lora_rank", "attention.kv_lora_rank", 512),
    Key("qk_nope_head_dim", "attention.qk_nope_head_dim", 128),
    Key("qk_rope_head_dim", "attention.qk_rope_head_dim", 64),
    Key("v_head_dim", "attention.v_head_dim", 128),
)
"""Keys of a model with latent attention."""
LATENT_ALWAYS = {"attention.kind": "mla", "attention.latent_norm_eps": 1e-6}
"""What such models always have. The norms of the latents do not take `rms_norm_eps` in DeepSeek's own code either."""


class DeepSeekMoE(Family):
    """Shared experts beside routed ones, after some dense blocks.

    Attributes:
        defaults: of keys that no `Key` says: first_k_dense_replace, n_shared_experts, n_group and topk_group.
        group_score: a group's score, as `model.moe.gate.group_score`.
        predicts: its files may have blocks of multi-token prediction.
    """

    defaults: ClassVar[Mapping[str, int]] = {}
    group_score: ClassVar[str] = "top2"
    predicts: ClassVar[bool] = False

    def default(self, raw: Mapping[str, Any], found: Derived, name: str) -> int:
        """A whole number of config.json; null and 0 are the same."""
        found.read.add(name)
        return int(raw.get(name, self.defaults.get(name)) or 0)

    def moe_blocks(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[bool]:
        """All after the first."""
        self.require(raw, found, "moe_layer_freq", 1)
        first = self.default(raw, found, "first_k_dense_replace")
        return [layer >= first for layer in range(depth)]

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Shared experts, groups of experts, and the loss that balances them."""
        groups, kept = (self.default(raw, found, name) for name in ("n_group", "topk_group"))
        if self.grouped(raw, found) and groups > 1:
            found.values |= {"moe.gate.groups": groups, "moe.gate.groups_kept": kept}
            found.values["moe.gate.group_score"] = self.group_score
        if shared := self.default(raw, found, "n_shared_experts"):
            found.values["moe.shared_experts"] = shared
        found.read |= {"aux_loss_alpha", "seq_aux"}
        by_sequence = raw.get("seq_aux", True)
        loss = "moe.sequence_balance_loss" if by_sequence else "moe.balance_loss"
        found.values |= {"moe.balance_loss": 0.0, loss: raw.get("aux_loss_alpha") or 0.0}

    def grouped(self, raw: Mapping[str, Any], found: Derived) -> bool:
        """True if experts are chosen by groups."""
        return True

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """The same, back."""
        m = model.moe
        if m is None:
            return
        dense = [layer for layer in range(model.depth) if not model.is_moe(layer)]
        raw |= {"first_k_dense_replace": len(dense), "moe_layer_freq": 1}
        raw |= {"n_group": m.gate.groups, "topk_group": m.gate.groups_kept}
        raw["n_shared_experts"] = m.shared_width // m.ffn_hidden or None
        raw |= {"seq_aux": not m.balance_loss, "aux_loss_alpha": m.balance_loss or m.sequence_balance_loss}


class SigmoidMoE(DeepSeekMoE):
    """DeepSeek-V3's gate: sigmoids, and a bias for selection, in float32."""

    always = {"moe.gate.score": "sigmoid", "moe.selection_bias": True}
    float32 = frozenset({"ffn.gate.selection_bias"})

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Also the names that files have for this gate."""
        self.require(raw, found, "scoring_func", "sigmoid", "noaux_tc")
        self.require(raw, found, "topk_method", "noaux_tc")
        super().more(raw, found)
        found.notes.append("experts are balanced by a bias, which stays as loaded unless model.moe.bias_rate is set")

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Also the names that files have for this gate."""
        super().write_more(model, raw)
        raw |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        if self.predicts:
            raw["num_nextn_predict_layers"] = model.predicted

    def predict(self, raw: Mapping[str, Any], found: Derived, tensors: Collection[str] | None) -> None:
        """Blocks of multi-token prediction, which lie behind the others."""
        found.read |= {"num_nextn_predict_layers", "num_mtp_layers"}
        names = ("num_nextn_predict_layers", "num_mtp_layers")
        count = next((raw[name] for name in names if raw.get(name) is not None), 0)
        if not count or not self.predicts:
            return
        prefix = self.block.format(layer=raw.get("num_hidden_layers"))
        if tensors is None or any(name.startswith(prefix) for name in tensors):
            found.values["mtp.depth"] = count
        else:
            named = plural(count, "block")
            found.notes.append(f"config.json names {named} of multi-token prediction, and the files have none")

    def copies(self, model: ModelConfig) -> dict[str, str]:
        """Blocks of multi-token prediction have the embedding and the head, too."""
        found = {}
        for layer in range(model.depth, model.blocks):
            prefix = self.block.format(layer=layer)
            found[f"{prefix}embed_tokens.weight"] = "embed.weight"
            found[f"{prefix}shared_head.head.weight"] = "embed.weight" if model.tie_embeddings else "head.weight"
        return found

    def is_left_out(self, name: str, model: ModelConfig) -> bool:
        """Also those of blocks of multi-token prediction that the model has not."""
        found = re.match(r"model\.layers\.(\d+)\.", name)
        beyond = self.predicts and found is not None and int(found[1]) >= model.blocks
        return beyond or super().is_left_out(name, model)


def rotary_rows(inner: str, mixer: Mixer) -> tuple[int, ...] | None:
    """The rows of latent attention's rotary parts, which lie as pairs in DeepSeek's files."""
    a: Any = mixer.a
    nope, rope = a.qk_nope_head_dim, a.qk_rope_head_dim
    if inner in ("attention.q_proj.weight", "attention.q_b_proj.weight"):
        return halves_from_pairs(a.heads, nope + rope, nope)
    if inner == "attention.kv_a_proj.weight":
        return halves_from_pairs(1, a.kv_lora_rank + rope, a.kv_lora_rank)
    return None
