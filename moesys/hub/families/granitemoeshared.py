"""Granite with experts and a shared expert (IBM 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moesys.hub.derived import Derived
from moesys.hub.granite import Granite
from moesys.hub.mapping import Stored, identity
from moesys.models.parts.axes import Weight
from moesys.models.parts.mixer import Mixer

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class GraniteMoeShared(Granite):
    """Granite-MoE with a shared expert, whose gate and up projections are one tensor."""

    kind = "granitemoeshared"
    summary = "Granite-MoE with a shared expert"
    architecture = "GraniteMoeSharedForCausalLM"
    released = ("moe-7b-1b-active-shared-experts",)
    names = {**Granite.names, "ffn.shared.down_proj.weight": "shared_mlp.output_linear.weight"}

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Also the shared expert."""
        super().more(raw, found)
        found.read.add("shared_intermediate_size")
        if width := raw.get("shared_intermediate_size"):
            found.values |= {"moe.shared_experts": 1, "moe.shared_ffn_hidden": width}

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Also the shared expert."""
        super().write_more(model, raw)
        raw["shared_intermediate_size"] = 0 if model.moe is None else model.moe.shared_width

    def in_block(self, inner: str, weight: Weight, prefix: str, mixer: Mixer) -> Iterable[Stored]:
        """The shared expert's gate projection lies before the up projection."""
        place = {"ffn.shared.gate_proj.weight": 0, "ffn.shared.up_proj.weight": 1}.get(inner)
        if place is None:
            return super().in_block(inner, weight, prefix, mixer)
        width = weight.shape[0]
        rows = tuple(range(place * width, (place + 1) * width))
        return [identity(f"{prefix}shared_mlp.input_linear.weight", weight.shape, rows, 2 * width)]
