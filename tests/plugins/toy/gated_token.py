"""A mixer in which tokens do not meet: `down(silu(gate(x)) · up(x))` of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from moesys.config.section import Dim, Section
from moesys.models.layers import FeedForward
from moesys.models.parts.axes import Axis, Kept, Weight
from moesys.models.parts.mixer import Mixer


class GatedTokenKeys(Section):
    """Keys of gated tokens."""

    token_inner: Dim = 32
    """gated_token: inner features."""


class GatedTokenModule(FeedForward):
    """The module; positions play no part."""

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, H] → [B, S, H]."""
        return super().forward(x_BSH)


class GatedToken(Mixer):
    """A feed-forward in the place of attention."""

    kind = "gated_token"
    summary = "each token by itself"
    keys = GatedTokenKeys

    def weights(self) -> Iterator[Weight]:
        """Three matrices."""
        hidden, inner = (
            Axis("hidden", self.model.hidden),
            Axis("inner", self.a.token_inner, key=f"{self.path}.token_inner"),
        )
        yield Weight("gate_proj.weight", (inner, hidden))
        yield Weight("up_proj.weight", (inner, hidden))
        yield Weight("down_proj.weight", (hidden, inner))

    def kept(self, run: Any, shape: Any) -> Iterator[Kept]:
        """Both products, and what is made of them."""
        yield Kept(4 * self.a.token_inner, "inner")

    def build(self) -> nn.Module:
        """The module."""
        return GatedTokenModule(self.model.hidden, self.a.token_inner)
