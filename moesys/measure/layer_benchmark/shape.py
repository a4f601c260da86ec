"""The sizes of one MoE layer, and those of published models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """T tokens of size H, E experts of inner size F, k of them per token."""

    tokens: int
    hidden: int
    ffn_hidden: int
    experts: int
    top_k: int

    @property
    def flops(self) -> int:
        """Of the experts' products, forward and backward."""
        return 18 * self.tokens * self.top_k * self.hidden * self.ffn_hidden

    def kept_bytes(self, size: int) -> int:
        """What must be kept for backward: tokens and first products of `size` bytes per element, routing."""
        products = 2 * self.tokens * self.top_k * self.ffn_hidden
        routing = self.tokens * (4 * self.experts + self.top_k * (4 + 8 + 8))
        return size * (self.tokens * self.hidden + products) + routing


SHAPES = {
    "laptop": LayerShape(4096, 512, 1024, 16, 2),
    "two-ranks": LayerShape(1024, 256, 512, 8, 2),
    "mixtral-8x7b": LayerShape(8192, 4096, 14336, 8, 2),
    "qwen3-30b-a3b": LayerShape(32768, 2048, 768, 128, 8),
    "deepseek-v3": LayerShape(8192, 7168, 2048, 256, 8),
}

PUBLISHED = tuple(SHAPES[name] for name in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"))
