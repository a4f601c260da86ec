"""The base of all parts of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from moesys.errors import Problem
from moesys.models.parts.axes import Exchange, Kept, Weight

if TYPE_CHECKING:
    from torch import nn


class Part:
    """A part of a model: the answers to what sizes, plans, checks and builders ask.

    Attributes:
        reads, writes: whether it takes its input from the stream, and adds its output to it. Tensor parallelism makes
            an input whole for weights that it splits, and sums the outputs of these.
    """

    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    def apart(self) -> Iterator[Part]:
        """Parts inside of it that take slices of the sequence, as it does, instead of the stream."""
        yield from ()

    def weights(self) -> Iterator[Weight]:
        """Its parameters in the order of the built module, by their names in it."""
        raise NotImplementedError

    def multiply_adds(self, weight: Weight, seq_len: int) -> float:
        """Multiply-adds per token and element of one of its matrices."""
        return 0.0 if weight.looked_up else 1.0

    def active(self, weight: Weight) -> float:
        """Share of one of its weights that a token uses."""
        return 1.0

    def flops(self, seq_len: int) -> float:
        """FLOPs of one token's forward pass beside those of the matrices."""
        return 0.0

    def kept(self, run: Any, shape: Any) -> Iterator[Kept]:
        """What it keeps for backward. `run`: the configuration; `shape`: a `moesys.parallel.cost.StepShape`.

        Selective recomputation keeps `products`, too.
        """
        yield from ()

    def products(self) -> Iterator[Kept]:
        """The results of products with its matrices [outputs, inputs], needed in backward or not.

        Where tp splits the inputs, each tensor rank has a whole result: its part of the sum.
        """
        for weight in self.weights():
            if weight.kind == "matrix" and not weight.looked_up:
                yield Kept(weight.axes[0].size, weight.axes[0].name, plain=False, selective=True)

    def results(self, shape: Any) -> Iterator[Kept]:
        """What its weights give; a backward that is split keeps the gradients of that between its parts.

        `shape`: as for `kept`.
        """
        yield from self.products()

    def exchanges(self, run: Any, tokens: int, sequences: int) -> Iterator[Exchange]:
        """Collectives of one forward pass in training over `tokens` of `sequences`, the whole micro-batch."""
        yield from ()

    def check(self) -> list[Problem]:
        """Rules between its keys that are broken."""
        return []

    def megatron(self) -> list[Problem]:
        """Keys that `engine: megatron` cannot follow, each with the rule; remedies are the engine's."""
        return []

    def build(self) -> nn.Module:
        """The module, uninitialised on the meta device."""
        raise NotImplementedError
