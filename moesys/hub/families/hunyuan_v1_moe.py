"""Hunyuan-A13B (Tencent 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesys.hub.derived import Derived
from moesys.hub.family import Family
from moesys.hub.keys import GROUPED, REQUIRED, Key, with_defaults
from moesys.hub.rotary import Rotary

LISTED = ("moe_topk", "moe_intermediate_size", "num_shared_expert", "num_experts")
"""Keys that may be lists with a value per block."""

_UNUSED = """
    cla_share_factor dense_list num_media_embeds q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    moe_drop_tokens moe_random_routing_dropped_token capacity_factor group_limited_greedy
    attention_head_dim org_vocab_size mask_init_id image_token_id text_start_id text_end_id video_start_id
    video_end_id im_newline_id add_classification_head class_num pool_type anyres_pooling_size
    anyres_vit_max_image_size anyres_vit_two_views skip_cls_token vit_add_patchemb_bias vit_input_resolution
    vit_mapping_type vit_norm_type vit_patch vit_path vit_remove_prenorm vit_token vit_type vit_used_rms_norm
    vit_used_rotary vit_used_qk vit_used_lr
"""


@dataclass(frozen=True)
class StretchedBase(Rotary):
    """Rotary positions whose base is stretched by `alpha`: files call this dynamic, yet no sequence changes it."""

    def read(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Multiply the base."""
        given = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
        alpha = given.get("alpha")
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind != "dynamic" or not alpha:
            return super().read(raw, found)
        size = found.values.get("attention.head_dim") or found.values["hidden"] // found.values["attention.heads"]
        theta = given.get("rope_theta") or raw.get("rope_theta") or self.theta
        base = theta * alpha ** (size / (size - 2))
        super().read({**raw, "rope_scaling": None, "rope_parameters": None, "rope_theta": base}, found)


class HunyuanV1Moe(Family):
    """Softmax over all experts, a shared expert; norms of queries and keys after their rotation."""

    kind = "hunyuan_v1_moe"
    summary = "Hunyuan-A13B"
    architecture = "HunYuanMoEV1ForCausalLM"
    released = ("Hunyuan-A13B-Instruct",)
    fields = (
        *with_defaults(GROUPED, rms_norm_eps=1e-5),
        Key("attention_bias", "attention.bias", False),
        Key("intermediate_size", "moe.ffn_hidden", REQUIRED),
        Key("num_experts", "moe.experts", 1),
        Key("moe_topk", "moe.top_k", 1),
    )
    always = {
        "attention.qk_norm": "head_after_rotary",
        "moe.normalize": True,
        "moe.shared_experts": 1,
        "moe.balance_loss": 0.0,
    }
    only = {
        "hidden_act": "silu",
        "use_qk_norm": True,
        "norm_type": "rms",
        "use_mixed_mlp_moe": True,
        "num_shared_expert": 1,
        "mlp_bias": False,
        "use_cla": False,
        "position_embedding_xdrope": False,
        "use_mla": False,
        "norm_topk_prob": True,
    }
    ignored = frozenset(_UNUSED.split())
    names = {
        "ffn.gate.projection.weight": "mlp.gate.wg.weight",
        **{f"ffn.shared.{m}_proj.weight": f"mlp.shared_mlp.{m}_proj.weight" for m in ("gate", "up", "down")},
        "attention.q_norm.weight": "self_attn.query_layernorm.weight",
        "attention.k_norm.weight": "self_attn.key_layernorm.weight",
    }
    float32 = frozenset({"ffn.gate.projection.weight"})
    rotary = StretchedBase()

    def read(self, raw: Mapping[str, Any], tensors: Any = None) -> Derived:
        """Lists with a value per block must repeat one value."""
        one = {key: raw[key][0] for key in LISTED if isinstance(raw.get(key), list) and len(set(raw[key])) == 1}
        found = super().read({**raw, **one}, tensors)
        for key in LISTED:
            if isinstance(raw.get(key), list) and key not in one:
                found.refuse(key, "differs between blocks, and is the model's here")
        return found

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """The size of experts, which is that of the shared one."""
        self.require(raw, found, "moe_intermediate_size", raw.get("intermediate_size"))
        self.require(raw, found, "attention_head_dim", raw.get("head_dim"), None)
