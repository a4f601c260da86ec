"""The one place where parallelism is applied to a model, in one order.

1. pipeline: the layers of this rank's stages; everything after concerns only those;
2. context: positions, and attention across the context axis;
3. tensor: weights split inside layers, on plain parameters;
4. expert: experts split over their own mesh, with a dispatcher;
5. recompute and compile each block by its parts: inside sharding, so that gathering weights stays outside;
6. data: FSDP2 last, since it must see parameters as the others leave them.

Removing a dimension removes one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moesys.config.schema import Config
from moesys.models.block import Block
from moesys.models.decoder import Decoder
from moesys.moe.layer import MoELayer, moe_layers
from moesys.parallel import context, data, expert, freeze, pipeline, tensor
from moesys.parallel.cost import Stage, counting_passes
from moesys.parallel.gradient_sync import settled
from moesys.parallel.gradients import Gradients
from moesys.parallel.initialise import canonical, initialise
from moesys.parallel.loss import IGNORED, TokenLoss
from moesys.parallel.mesh import ParallelMesh
from moesys.parallel.recompute import prepare
from moesys.parallel.schedules import Pipelined, Whole
from moesys.parallel.step_statistics import counted, later, numbers, step_totals

FILLER = 0
"""The id that multi-token prediction reads after the end of a sequence, as Megatron-Core does; no label is there."""


@dataclass
class Composed:
    """A model under parallelism, as one rank has it.

    Attributes:
        parts: the stages of this rank, in order.
        engine: runs global-batch shares forward and backward.
        gradients: what to do between backward and the optimizer.
    """

    config: Config
    mesh: ParallelMesh
    parts: list[Decoder]
    stages: list[Stage]
    engine: Whole | Pipelined
    gradients: Gradients
    loss: TokenLoss

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of this rank by their layout-independent names."""
        tied = self.config.model.tie_embeddings
        return {canonical(n, tied): p for part in self.parts for n, p in part.named_parameters()}

    def decays(self, name: str) -> bool:
        """Whether the weights of this parameter decay: those of matrices do."""
        return self.parts[0].described[name].kind == "matrix"

    def moe_layers(self) -> dict[str, MoELayer]:
        """All MoE layers of this rank by their layout-independent names."""
        return self._moe_layers

    @cached_property
    def _moe_layers(self) -> dict[str, MoELayer]:
        return {canonical(n + ".", False)[:-1]: m for part in self.parts for n, m in moe_layers(part).items()}

    def named_buffers(self) -> dict[str, Tensor]:
        """All state of this rank's gates that is saved with the model, by layout-independent names."""
        layers = self.moe_layers().items()
        return {f"{name}.gate.{key}": value for name, m in layers for key, value in m.gate.state_dict_buffers()}

    def train(self, tokens: Tensor, labels: Tensor, samples: range) -> Tensor:
        """Forward and backward; gradients are complete after `gradients.reduce()`.

        tokens, labels: int64 [global_batch / dp, S], the whole sequences of this data rank, whose
        numbers in the run are `samples`; the context axis' share is taken here. Returns this rank's
        share of the loss.
        """
        self._mode(training=True)
        mine = self._mine(tokens, labels, samples)
        if counting_passes(self.config, self.mesh.degrees.dp):
            self._count(mine)
        return self.engine.train(*mine)

    def after_step(self, skipped: Tensor) -> None:
        """Let gates that follow the global batch see it, or forget a step that is `skipped`: bool [], the same on all
        ranks, for which the host does not wait. Collective over each pipeline stage."""
        for gate, total in step_totals([layer.gate for layer in self.moe_layers().values()], self.mesh):
            kept = {name: buffer.clone() for name, buffer in gate.state_dict_buffers()}
            gate.after_step(total)
            for name, buffer in gate.state_dict_buffers():
                buffer.copy_(torch.where(skipped, kept[name], buffer))

    def _count(self, mine: tuple[Tensor, Tensor]) -> None:
        """Let gates that must know the global batch before they route see it: a forward pass, as in training."""
        tokens, labels = mine
        with counted(self.moe_layers(), self.mesh):
            self._forward((tokens, labels[:, 0] if labels.ndim > 2 else labels))

    def evaluate(self, tokens: Tensor, labels: Tensor, samples: Sequence[int]) -> Tensor:
        """Forward only, shapes as in `train`; samples below 0 are padding. tokens, labels: int64 [B, S]."""
        self._mode(training=False)
        return self._forward(self._mine(tokens, labels, samples))

    def _forward(self, mine: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.engine.evaluate(*mine)
        # Without a backward FSDP leaves whole what it keeps for one: it would be saved as such.
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return loss

    def _mode(self, training: bool) -> None:
        if self.parts[0].training != training:
            for part in self.parts:
                part.train(training)

    def _mine(self, tokens: Tensor, labels: Tensor, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the model and the loss take, of this context rank's positions.

        In training with multi-token prediction tokens have the ids of the D after them beside their own: int64
        [B, S, 2 + D], and labels those of each depth: int64 [B, 1 + D, S].
        """
        depth = self.config.model.predicted if self.parts[0].training else 0
        numbered = torch.stack((numbers(tokens, samples), tokens, *later(tokens, depth, FILLER)), -1)
        if depth:
            labels = torch.stack((labels, *later(labels, depth, IGNORED)), 1)
        positions = self.parts[0].positions
        if self.mesh.degrees.cp == 1 or positions is None:
            return numbered, labels
        return numbered[:, positions], labels[..., positions]


def compose(
    config: Config, mesh: ParallelMesh, vocab_size: int, dtype: torch.dtype | None = None, draw: bool = True
) -> Composed:
    """Build this rank's part of the model, on the meta device first, and initialise it.

    Collective over the world. `dtype` is the type of the weights, default float32; without `draw` these are NaN,
    for a checkpoint to overwrite.
    """
    every = pipeline.stages(config, vocab_size)
    mine = every[mesh.place["pp"] :: config.parallel.pp]
    parts = [_part(config, mesh, vocab_size, stage, dtype or torch.float32, draw) for stage in mine]
    t = config.train
    micro_batches = t.global_batch // (mesh.degrees.dp * t.micro_batch)
    for part in parts:
        for layer in moe_layers(part).values():
            layer.loss_scale = 1.0 / (micro_batches * mesh.degrees.dp)
    loss = TokenLoss(t.global_batch * t.seq_len, mesh.mesh("tp"), config.model.loss_weights)
    gradients = _gradients(config, mesh, parts, mine)
    engine = _engine(config, mesh, parts, mine, micro_batches, loss, vocab_size, gradients)
    return Composed(config, mesh, parts, mine, engine, gradients, loss)


def _part(config: Config, mesh: ParallelMesh, vocab_size: int, stage: Stage, dtype: torch.dtype, draw: bool) -> Decoder:
    stream = torch.bfloat16 if config.train.dtype == "bfloat16" else dtype
    with torch.device("meta"):
        model = Decoder(config.model, vocab_size, stream).to(dtype)
    model.keep(stage.layers, stage.first, stage.last)
    model = context.apply(model, mesh, config)
    model = tensor.apply(model, mesh, config)
    model = expert.apply(model, mesh, config)
    freeze.apply(model, config)
    for layer in moe_layers(model).values():
        layer.apart = mesh.degrees.dp_shard > 1  # FSDP gathers the experts' weights as they are called
    for block in model.layers.values():
        assert isinstance(block, Block)
        prepare(block, config.train.recompute, config.train.compile)
    model = data.apply(model, mesh, config)
    model.to_empty(device=mesh.device)
    if config.model.tie_embeddings and model.head is not None and model.embed is not None:
        # to_empty replaces plain parameters, one module at a time; DTensors keep their identity.
        model.head.weight = model.embed.weight
    initialise(model, config.seed, config.model.init_std, config.model.tie_embeddings, draw)
    return model


def _engine(
    config: Config,
    mesh: ParallelMesh,
    parts: list[Decoder],
    stages: list[Stage],
    micro_batches: int,
    loss: TokenLoss,
    vocab_size: int,
    gradients: Gradients,
) -> Whole | Pipelined:
    last = gradients.last_backward
    each = settled(config, mesh.degrees, vocab_size).parallel.sync_gradients == "each"
    if config.parallel.pp == 1:
        return Whole(parts[0], micro_batches, loss, last, each)
    t, d = config.train, mesh.degrees
    held = t.seq_len // d.cp
    width = held // d.tp if config.parallel.sp else held
    tokens = torch.empty(t.micro_batch, held, dtype=torch.int64, device="meta")
    like = partial(torch.empty, dtype=parts[0].dtype, device="meta", requires_grad=True)
    stream = like((t.micro_batch, width, config.model.hidden))
    training, evaluation = (
        [(tokens if s.first else stream, like((rows, held, vocab_size // d.tp)) if s.last else stream) for s in stages]
        for rows in (t.micro_batch * (1 + config.model.predicted), t.micro_batch)
    )
    schedule = config.parallel.pp_schedule
    return Pipelined(list(parts), stages, schedule, micro_batches, loss, mesh, (training, evaluation), last, each)


def _gradients(config: Config, mesh: ParallelMesh, parts: list[Decoder], stages: list[Stage]) -> Gradients:
    tied = config.model.tie_embeddings
    if not config.model.ends_share_embedding or mesh.degrees.pp == 1:
        return Gradients(list(parts), mesh)
    # The embedding's copies on the first and the last stage get the sum of both gradients. All ranks
    # take part in making the groups.
    d, group = mesh.degrees, None
    for ranks in d.groups(("pp",)):
        ends = dist.new_group([ranks[0], ranks[-1]], timeout=timedelta(seconds=config.launch.timeout_s))
        if mesh.rank in (ranks[0], ranks[-1]):
            group = ends
    weights = [
        p
        for part, s in zip(parts, stages, strict=True)
        if s.first or s.last
        for n, p in part.named_parameters()
        if canonical(n, tied) == "embed.weight"
    ]
    return Gradients(list(parts), mesh, (weights[0], group) if weights and group is not None else None)
