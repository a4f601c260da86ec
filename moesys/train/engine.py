"""The interface of engines: a model under parallelism, and its optimizer.

An engine is a module with `connect(config)`, which joins the run's process group and returns this rank's place in it,
and `build(config, mesh, vocab_size, dtype)`, which makes this rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from moesys.config.schema import Config
from moesys.data.corpus import Corpus
from moesys.data.routing_files import block
from moesys.moe.layer import MoELayer
from moesys.parallel.mesh import Ranks

MODULES = {"native": "moesys.train.native", "megatron": "moesys.megatron.engine"}
"""Modules by the values of `engine`. They are imported by name, because Megatron's is on a floor above."""


class Update(NamedTuple):
    """The result of an update, on the device: the host need not wait for it.

    Attributes:
        norm: global L2 norm of the gradients before clipping, float64 [], the same on all ranks.
        skipped: bool [], the same on all ranks: True if the norm or the loss is not finite, so that nothing was
            updated.
        bad: returns the parameters of this rank whose gradients are not finite; waits for the device.
    """

    norm: Tensor
    skipped: Tensor
    bad: Callable[[], list[str]]


class Engine(Protocol):
    """One rank's part of a model and its optimizer.

    Every method but `moe_layers` and `nonfinite` is collective over the world. Names of parameters and layers are those
    of `moesys.models.Decoder`, whatever the layout.
    """

    @property
    def config(self) -> Config:
        """The run's configuration."""

    @property
    def mesh(self) -> Ranks:
        """The ranks of the run."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights in checkpoints."""

    def train(self, tokens: Tensor, labels: Tensor, samples: range) -> Tensor:
        """Run forward and backward of this data rank's share of a global batch; gradients are complete afterwards.

        tokens, labels: int64 [global_batch / dp, S]; `samples` are their numbers in the run. Returns this
        rank's share of the mean loss: the sum over the world is tp times that.
        """

    def later_losses(self) -> Tensor:
        """This rank's shares of the losses of multi-token prediction, as `train` returns the next token's: float [D].

        Those since the last call, without their weights; a sequence of S labels counts as S at every depth, though the
        last k of depth k are missing.
        """

    def update(self, rate: float) -> Update:
        """Clip the gradients, step with learning rate `rate`, and clear the gradients.

        If their norm or the loss of the step is not finite, nothing changes: neither weights, nor optimizer state, nor
        gates' buffers. All ranks agree on that, and the device decides it.
        """

    def nonfinite(self) -> list[str]:
        """Names of this rank's tensors that are not finite: weights, gates' buffers, and "NAME/SLOT" of the optimizer.

        Not collective.
        """

    def evaluate(self, tokens: Tensor, labels: Tensor, samples: Sequence[int]) -> Tensor:
        """The loss as `train` returns it, by forward alone; labels below 0 are ignored, but the divisor stays.

        tokens, labels: int64 [B, S].

        Samples below 0 are padding: their tokens take no capacity from others.
        """

    def moe_layers(self) -> dict[str, MoELayer]:
        """All MoE layers of this rank."""

    def gradients(self) -> dict[str, Tensor]:
        """Full gradients of this rank's stages on the CPU, without frozen parameters, between `train` and `update`."""

    def weights(self) -> dict[str, Tensor]:
        """Full parameters and gates' buffers of this rank's stages, on the CPU."""

    def save(self, folder: Path) -> None:
        """Write model and optimizer to `folder`, which one rank creates."""

    def load(self, folder: Path) -> set[str]:
        """Restore what `save` wrote, under any combination of parallelism.

        Gates' buffers ("model.layers.0.ffn.gate.selection_bias") may be missing there: they stay as they are, and their
        names are returned. Raises CheckpointError if anything else is missing or damaged.
        """

    def held(self) -> Iterator[tuple[str, Tensor, tuple[slice, ...]]]:
        """Every weight and gate's buffer of this rank: its name, the part that this rank holds, its place in the whole.

        Not collective. Who writes into the parts calls `written` afterwards.
        """

    def written(self) -> None:
        """Let the optimizer's copies follow weights that were written from outside; its state stays as it is new."""

    def load_weights(self, folder: Path) -> set[str]:
        """Restore the weights alone of what `save` wrote; as `load` otherwise."""


class EngineModule(Protocol):
    """The interface of the modules in `MODULES`."""

    def connect(self, config: Config) -> Ranks:
        """Join the run's process group; returns the ranks, with this rank's place."""

    def build(
        self, config: Config, mesh: Ranks, vocab_size: int, dtype: torch.dtype | None = None, draw: bool = True
    ) -> Engine:
        """Build this rank's part. Without `draw`, parameters are NaN until `Engine.load` overwrites them."""


def engine_of(config: Config) -> EngineModule:
    """The module of the engine that a configuration names."""
    return cast(EngineModule, import_module(MODULES[config.engine]))


def prepare_gates(engine: Engine, corpus: Corpus) -> None:
    """Give the gates of this rank what they know of files and of the training data.

    Raises:
        DataError: a file is missing, or is not of this model.
    """
    if (moe := engine.config.model.moe) is not None:
        gates = {block(name): layer.gate for name, layer in engine.moe_layers().items()}
        moe.router.prepare(gates, corpus, engine.mesh.device)
