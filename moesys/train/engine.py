"""What a run trains with: a model under parallelism and its optimizer, behind one interface.

An engine is a module with `connect(config)`, which joins the run's process group and says where this rank
lies, and `build(config, mesh, vocab_size, dtype)`, which makes this rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from moesys.config.schema import Config
from moesys.moe.layer import MoELayer
from moesys.parallel.mesh import Ranks

MODULES = {"native": "moesys.train.native", "megatron": "moesys.megatron.engine"}
"""By the values of `engine` in the configuration; found by name, for Megatron's stands on a floor above."""


class Update(NamedTuple):
    """What came of a step's gradients, on the device: the host need not wait for it.

    Attributes:
        norm: their global L2 norm before clipping, float64 [], the same on all ranks.
        skipped: bool [], the same on all ranks: whether the norm or the loss is not finite, so that nothing was
            updated.
        bad: waits for the device; the parameters of this rank whose gradients are not finite.
    """

    norm: Tensor
    skipped: Tensor
    bad: Callable[[], list[str]]


class Engine(Protocol):
    """A model and its optimizer, as one rank has them.

    Every method but `moe_layers` and `nonfinite` is collective over the world. Names of parameters and of
    layers are those of `moesys.models.Decoder`, whatever the layout.
    """

    @property
    def config(self) -> Config: ...
    @property
    def mesh(self) -> Ranks: ...
    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in checkpoints."""

    def train(self, tokens: Tensor, labels: Tensor, samples: range) -> Tensor:
        """Forward and backward of this data rank's share of a global batch; gradients are complete afterwards.

        tokens, labels: int64 [global_batch / dp, S], whose numbers in the run are `samples`. Returns this
        rank's share of the mean loss: the sum over the world is tp times that.
        """

    def update(self, rate: float) -> Update:
        """Clip, step with learning rate `rate`, forget the gradients.

        Where their norm or the loss of the step is not finite, nothing moves: neither weights, nor what the
        optimizer keeps, nor what gates follow. All ranks agree on that, and the device decides it.
        """

    def nonfinite(self) -> list[str]:
        """What this rank holds that is not finite, by name: weights, what gates keep, and "NAME/SLOT" of the
        optimizer. Not collective."""

    def evaluate(self, tokens: Tensor, labels: Tensor, samples: Sequence[int]) -> Tensor:
        """As `train`, forward only; labels below 0 count for nothing, but the divisor stays.

        Samples below 0 are padding: their tokens take no place in an expert from others.
        """

    def moe_layers(self) -> dict[str, MoELayer]:
        """All MoE layers of this rank."""

    def gradients(self) -> dict[str, Tensor]:
        """Between `train` and `update`: gradients of this rank's stages in full, on the CPU; none of frozen ones."""

    def weights(self) -> dict[str, Tensor]:
        """Parameters, and what gates keep, of this rank's stages in full, on the CPU."""

    def save(self, folder: Path) -> None:
        """Write model and optimizer to `folder`, which one rank creates."""

    def load(self, folder: Path) -> set[str]:
        """Restore what `save` wrote, under whatever combination of parallelism.

        What gates keep ("model.layers.0.ffn.gate.selection_bias") may be missing there, stays as it is, and is
        returned. Raises CheckpointError if anything else is missing, or something is damaged.
        """


class EngineModule(Protocol):
    """What a module of `MODULES` offers."""

    def connect(self, config: Config) -> Ranks: ...
    def build(
        self, config: Config, mesh: Ranks, vocab_size: int, dtype: torch.dtype | None = None, draw: bool = True
    ) -> Engine:
        """Without `draw` parameters are NaN until `Engine.load` overwrites them."""


def engine_of(config: Config) -> EngineModule:
    """The module of the engine that a configuration names."""
    return cast(EngineModule, import_module(MODULES[config.engine]))
