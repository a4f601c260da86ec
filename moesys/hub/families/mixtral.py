"""Mixtral (Mistral AI 2024, arXiv 2401.04088)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesys.hub import blocks
from moesys.hub.derived import Derived
from moesys.hub.experts import PerExpert
from moesys.hub.family import Family
from moesys.hub.keys import GROUPED, REQUIRED, Key, with_defaults
from moesys.hub.rotary import Rotary

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Mixtral(Family):
    """Softmax over the two chosen experts of eight; every block is MoE."""

    kind = "mixtral"
    summary = "Mixtral"
    architecture = "MixtralForCausalLM"
    released = ("Mixtral-8x7B", "Mixtral-8x22B")
    fields = (
        *with_defaults(GROUPED, rms_norm_eps=1e-5, num_key_value_heads=8),
        Key("intermediate_size", "moe.ffn_hidden", REQUIRED),
        Key("num_local_experts", "moe.experts", 8),
        Key("num_experts_per_tok", "moe.top_k", 2),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
        Key("router_jitter_noise", "moe.gate.jitter", 0.0),
    )
    always = {"moe.normalize": True}
    names = {"ffn.gate.projection.weight": "block_sparse_moe.gate.weight"}
    rotary = Rotary(theta=1000000.0)
    experts = PerExpert("block_sparse_moe.experts.{expert}.", "w1", "w3", "w2")

    def windows(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[int | None]:
        """The same for every block."""
        found.read.add("sliding_window")
        return [raw.get("sliding_window") or None] * depth

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """The window."""
        raw["sliding_window"] = blocks.windows(model)[0]
