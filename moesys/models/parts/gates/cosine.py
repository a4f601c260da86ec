"""Token choice by cosines in a low dimension."""

from __future__ import annotations

from collections.abc import Iterator
from math import log
from typing import TYPE_CHECKING, Any

from moesys.config.section import Dim
from moesys.errors import Problem
from moesys.models.parts.axes import Axis, Kept, Weight
from moesys.models.parts.gates.kind import SCORE, ChoiceKeys
from moesys.models.parts.gates.top_k import TokenChoice, check_groups, check_second

if TYPE_CHECKING:
    from torch import nn

START = log(0.3)
"""The logarithm of the temperature starts from this, as `moesys.moe.gates.cosine` says."""


class CosineKeys(ChoiceKeys):
    """Keys of choice by cosines."""

    dim: Dim | None = None
    """The low dimension; default: half the number of experts, at least 2."""


class Cosine(TokenChoice):
    """Each token goes to its k best experts by cosines, with a learned temperature (X-MoE, arXiv 2204.09179)."""

    kind = "cosine"
    summary = "the same as top_k by cosines in a low dimension, with a learned temperature (X-MoE)"
    aliases = ("x_moe",)
    keys = CosineKeys

    @property
    def dim(self) -> int:
        """The low dimension."""
        return self.moe.gate.dim or max(2, self.candidates // 2)

    def projection_weights(self, hidden: int) -> Iterator[Weight]:
        """Down to the low dimension, one direction per candidate, and the temperature."""
        low = Axis("low", self.dim)
        yield Weight("projection.down", (low, Axis("hidden", hidden)))
        yield Weight("projection.weight", (Axis("candidate", self.candidates), low), normalized=True)
        yield Weight("projection.log_temperature", (Axis("one", 1),), "temperature", start=START)

    def kept(self, hidden: int, shape: Any) -> Iterator[Kept]:
        """The tokens in float32, too; jitter makes them so."""
        yield from super().kept(hidden, shape)
        if shape.width < SCORE and not self.moe.gate.jitter:
            yield Kept(hidden, "tokens", width=SCORE)

    def check(self) -> list[Problem]:
        """What k, weights and groups must be."""
        return super().check() + check_second(self.moe) + check_groups(self.moe)

    def projection(self, hidden: int) -> nn.Module:
        """What makes logits of tokens."""
        from moesys.moe.gates.cosine import CosineProjection

        return CosineProjection(hidden, self.candidates, self.dim)
