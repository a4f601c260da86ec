"""What config.json of Qwen's models has in common: windows, and which blocks are dense. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from moesys.hub import blocks, layer_types
from moesys.hub.derived import Derived
from moesys.hub.family import Family

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Qwen(Family):
    """Windows by `use_sliding_window`, and dense blocks by `mlp_only_layers` and `decoder_sparse_step`.

    Attributes:
        windowed: the blocks that have a window where `layer_types` is absent: those from `max_window_layers` on, every
            second one before it, or all.
        last: `max_window_layers` where files lack it.
    """

    only = {"hidden_act": "silu"}
    windowed: ClassVar[Literal["after", "turns", "all"]] = "after"
    last: ClassVar[int] = 28

    def windows(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[int | None]:
        """By `layer_types`, else as the family has it, if `use_sliding_window`."""
        found.read.add("use_sliding_window")
        last, use = raw.get("max_window_layers", self.last), bool(raw.get("use_sliding_window"))
        chosen = {
            "after": lambda i: i >= last,
            "turns": lambda i: i % 2 == 0 and i < last,
            "all": lambda i: True,
        }[self.windowed]
        absent = [layer_types.SLIDING if use and chosen(i) else layer_types.FULL for i in range(depth)]
        window = raw.get("sliding_window", 4096) if use else None
        return layer_types.read({**raw, "sliding_window": window}, found, None, absent)

    def moe_blocks(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[bool]:
        """Every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
        if not any(key.startswith("moe.") for key in found.values):
            return [False] * depth
        found.read |= {"mlp_only_layers", "decoder_sparse_step"}
        dense, step = raw.get("mlp_only_layers") or (), raw.get("decoder_sparse_step") or 1
        return [layer not in dense and (layer + 1) % step == 0 for layer in range(depth)]

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """The same, back."""
        layer_types.write(model, raw)
        raw["use_sliding_window"] = raw["sliding_window"] is not None
        raw["max_window_layers"] = model.depth
        if model.moe is not None:
            rule = blocks.moe_rule([model.is_moe(layer) for layer in range(model.depth)])
            step = (rule or {}).get("moe.every", 1) if rule is not None and "moe.first_dense" not in rule else 1
            raw["decoder_sparse_step"] = step
            raw["mlp_only_layers"] = [
                layer for layer in range(model.depth) if not model.is_moe(layer) and (layer + 1) % step == 0
            ]
