"""Mistral (Mistral AI 2023, arXiv 2310.06825): a dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesys.hub import blocks
from moesys.hub.derived import Derived
from moesys.hub.family import Family
from moesys.hub.keys import GROUPED, REQUIRED, Key, with_defaults

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig

WINDOW = 4096
"""`sliding_window` where files lack it."""


class Mistral(Family):
    """A dense decoder; every block has the same window, or none."""

    kind = "mistral"
    summary = "Mistral, dense"
    architecture = "MistralForCausalLM"
    released = ("Mistral-7B",)
    fields = (*with_defaults(GROUPED, num_key_value_heads=8), Key("intermediate_size", "ffn_hidden", REQUIRED))

    def windows(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[int | None]:
        """The same for every block."""
        found.read.add("sliding_window")
        return [raw.get("sliding_window", WINDOW) or None] * depth

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """The window."""
        raw["sliding_window"] = blocks.windows(model)[0]
