"""What Granite's files with experts have in common. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesys.hub.derived import Derived
from moesys.hub.experts import TRANSPOSED, Fused
from moesys.hub.family import Family
from moesys.hub.keys import GROUPED, REQUIRED, Key


class Granite(Family):
    """Softmax over the chosen experts; factors on embedding, scores, branches and logits."""

    fields = (
        *GROUPED,
        Key("attention_bias", "attention.bias", False),
        Key("attention_multiplier", "attention.softmax_scale", 1.0),
        Key("embedding_multiplier", "embedding_multiplier", 1.0),
        Key("residual_multiplier", "residual_multiplier", 1.0),
        Key("logits_scaling", "logits_divisor", 1.0),
        Key("intermediate_size", "moe.ffn_hidden", REQUIRED),
        Key("num_local_experts", "moe.experts", 8),
        Key("num_experts_per_tok", "moe.top_k", 2),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
    )
    always = {"moe.normalize": True}
    names = {"ffn.gate.projection.weight": "block_sparse_moe.router.layer.weight"}
    experts = Fused(
        {"fc1": "block_sparse_moe.input_linear.weight", "fc2": "block_sparse_moe.output_linear.weight"}, TRANSPOSED
    )

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Rotary positions are the only ones that are followed."""
        self.require(raw, found, "position_embedding_type", "rope")
