"""Names that most families have for our weights, outside of blocks and within one."""

from __future__ import annotations

MODEL_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "norm.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
    "head.bias": "lm_head.bias",
}
_LINEAR = ("weight", "bias")
_THREE = ("gate", "up", "down")
BLOCK_NAMES = {
    **{f"attention_norm.{p}": f"input_layernorm.{p}" for p in _LINEAR},
    **{f"ffn_norm.{p}": f"post_attention_layernorm.{p}" for p in _LINEAR},
    **{f"attention.{m}_proj.{p}": f"self_attn.{m}_proj.{p}" for m in "qkvo" for p in _LINEAR},
    **{f"attention.{m}_norm.weight": f"self_attn.{m}_norm.weight" for m in "qk"},
    "attention.q_a_proj.weight": "self_attn.q_a_proj.weight",
    "attention.q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.q_b_proj.weight": "self_attn.q_b_proj.weight",
    "attention.kv_a_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b_proj.weight": "self_attn.kv_b_proj.weight",
    "attention.sinks.weight": "self_attn.sinks",
    **{f"ffn.{m}_proj.weight": f"mlp.{m}_proj.weight" for m in _THREE},
    **{f"ffn.shared.{m}_proj.weight": f"mlp.shared_experts.{m}_proj.weight" for m in _THREE},
    "ffn.gate.projection.weight": "mlp.gate.weight",
    "ffn.gate.projection.bias": "mlp.gate.bias",
    "ffn.gate.selection_bias": "mlp.gate.e_score_correction_bias",
    "embed_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "project.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
"""Names that most families have."""
