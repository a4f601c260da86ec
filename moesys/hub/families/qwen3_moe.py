"""Qwen3-MoE (Qwen 2025, arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesys.hub.family import GROUPED, REQUIRED, Derived, Family, Key

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Qwen3Moe(Family):
    """128 experts, a norm of each head's query and key."""

    kind = "qwen3_moe"
    summary = "Qwen3-MoE"
    architecture = "Qwen3MoeForCausalLM"
    released = ("Qwen3-30B-A3B", "Qwen3-235B-A22B")
    fields = (
        *GROUPED,
        Key("intermediate_size", "ffn_hidden"),
        Key("moe_intermediate_size", "moe.ffn_hidden", REQUIRED),
        # Released files say num_experts; transformers 5 writes the other name.
        Key("num_experts", "moe.experts", 128, also=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.top_k", 8),
        Key("norm_topk_prob", "moe.normalize", False),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
        Key("decoder_sparse_step", "moe.every", 1),
    )
    always = {"attention.qk_norm": "head"}
    only = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
    ignored = frozenset({"sliding_window"})

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Blocks that are dense although they would be MoE: the first ones can be followed."""
        dense_first(raw, found)

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """The dense blocks by their numbers."""
        raw["mlp_only_layers"] = dense_blocks(model)


def dense_first(raw: Mapping[str, Any], found: Derived) -> None:
    """`mlp_only_layers` of Qwen's files: blocks that are dense, which must be those before all MoE blocks."""
    found.read.add("mlp_only_layers")
    dense, step = sorted(raw.get("mlp_only_layers") or []), raw.get("decoder_sparse_step") or 1
    if not dense:
        return
    if step != 1 or dense != list(range(len(dense))):
        found.refuse(
            "mlp_only_layers", f"is {dense} with decoder_sparse_step({step}): dense blocks must be the first ones"
        )
    found.values["moe.first_dense"] = len(dense)


def dense_blocks(model: ModelConfig) -> list[int]:
    """The numbers of the dense blocks, where no rule of one MoE block in every few gives them."""
    if model.moe is None or model.moe.every > 1:
        return []
    return [layer for layer in range(model.depth) if not model.is_moe(layer)]
