"""Dense feed-forwards, which shared experts are, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesys.models.parts.axes import Axis, Kept, Weight
from moesys.models.parts.part import Part

if TYPE_CHECKING:
    from torch import nn

GATED = ("swiglu", "geglu", "clipped_swiglu")
"""Activations that are products with a gate."""


@dataclass(frozen=True)
class DenseFeedForward(Part):
    """`down(act(gate(x)) · up(x))` (SwiGLU, arXiv 2002.05202), or `down(act(up(x)))`.

    Attributes:
        hidden, inner: sizes of the stream and of the inner features.
        activation: a kind of `moesys.kernels.activation`.
        key: the key that gives `inner`, for messages.
    """

    hidden: int
    inner: int
    activation: str = "swiglu"
    key: str = "model.ffn_hidden"

    @property
    def gated(self) -> bool:
        """Whether the activation has a gate."""
        return self.activation in GATED

    def weights(self) -> Iterator[Weight]:
        """The two or three matrices."""
        hidden, inner = Axis("hidden", self.hidden), Axis("inner", self.inner, key=self.key)
        if self.gated:
            yield Weight("gate_proj.weight", (inner, hidden))
        yield Weight("up_proj.weight", (inner, hidden))
        yield Weight("down_proj.weight", (hidden, inner))

    def kept(self, run: Any, shape: Any) -> Iterator[Kept]:
        """Products, and what is computed from them elementwise."""
        products = self.inner * (1.0 if self.gated else 0.5)
        yield Kept(4 * products, "inner")

    def build(self) -> nn.Module:
        """The module."""
        from moesys.models.layers import FeedForward

        return FeedForward(self.hidden, self.inner, self.activation)
