"""The Megatron engine: Megatron-Core's GPTModel, schedules, gradient reduction and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesys.config.schema import Config
from moesys.megatron.checkpoint import State
from moesys.megatron.mesh import MegatronRanks
from moesys.megatron.model import chunks, transformer_config
from moesys.megatron.names import ParameterNames, Piece, gathered, place_of
from moesys.megatron.native_layer import NativeLayer, PackedTokens
from moesys.megatron.quiet import quiet
from moesys.megatron.scope import ProcessGroups
from moesys.megatron.step import step
from moesys.models.size import by_name
from moesys.moe.layer import MoELayer
from moesys.parallel import pipeline
from moesys.parallel.cost import counting_passes
from moesys.parallel.initialise import initial
from moesys.parallel.step_statistics import counted, numbers, step_totals
from moesys.train.engine import Update
from moesys.train.finite import nonfinite


class _MicroBatch(NamedTuple):
    """The input of a stage for one micro-batch, each [b, S]."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    marks: Tensor


class MegatronEngine:
    """See `Engine`.

    Args:
        plug_in: use this project's MoE layer, else Megatron's own (for comparison).
        draw: draw initial weights; else they are NaN until `load` overwrites them.
        more: further fields of `TransformerConfig`.
    """

    dtype = torch.float32
    """The type of the optimizer's weights, which checkpoints hold."""

    def __init__(
        self,
        config: Config,
        ranks: MegatronRanks,
        vocab_size: int,
        plug_in: bool = True,
        draw: bool = True,
        **more: Any,
    ):
        self.config, self.mesh, self.ranks = config, ranks, ranks
        self.vocab_size, self.groups, self.marks = vocab_size, ProcessGroups.of(), PackedTokens(vocab_size)
        self.names = ParameterNames(config.model, vocab_size, place_of(self.groups))
        stages = pipeline.stages(config, vocab_size)
        with quiet():
            self.transformer = transformer_config(config, ranks, stages, **more)
            self.parts = chunks(config, ranks, vocab_size, self.transformer, plug_in)
            self._initialise(draw)
            self.model = self._reduced()
            self.optimizer = self._optimizer()

    def _initialise(self, draw: bool) -> None:
        std, described = self.config.model.init_std, by_name(self.config.model, self.vocab_size)
        with torch.no_grad():
            for _, piece, part in self.pieces():
                if draw:
                    part.copy_(initial(described[piece.name], piece.index, self.config.seed, std))
                else:
                    part.fill_(torch.nan)

    def held(self) -> Iterator[tuple[str, Tensor, tuple[slice, ...]]]:
        """See `Engine.held`."""
        for _, piece, part in self.pieces():
            yield piece.name, part, piece.index
        for name, buffer in self._buffers().items():
            yield name, buffer, tuple(slice(0, size) for size in buffer.shape)

    def written(self) -> None:
        """See `Engine.written`; in bfloat16 the optimizer's float32 copies are of the rounded weights."""
        self.optimizer.reload_model_params()

    def load_weights(self, folder: Path) -> set[str]:
        """See `Engine.load_weights`."""
        return self._state().load_weights(folder)

    def pieces(self) -> Iterator[tuple[nn.Parameter, Piece, Tensor]]:
        """Every parameter of this rank, piece by piece."""
        for chunk in self._inner():
            for parameter, pieces in self.names.pieces(chunk):
                for piece in pieces:
                    yield parameter, piece, piece.view(parameter.detach())

    def _inner(self) -> list[Any]:
        """The `GPTModel`s of this rank."""
        return [getattr(part, "module", part) if self.transformer.bf16 else part for part in self.parts]

    def _reduced(self) -> list[Any]:
        """The stages inside Megatron's DistributedDataParallel."""
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        shard, cuda = self.ranks.degrees.dp_shard > 1, self.ranks.device.type == "cuda"
        wanted = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=shard, overlap_grad_reduce=cuda
        )
        found = [
            DistributedDataParallel(self.transformer, wanted, part, disable_bucketing=number > 0)
            for number, part in enumerate(self.parts)
        ]
        self.transformer.finalize_model_grads_func = finalize_model_grads
        if cuda:
            own = [part.no_sync for part in found]
            self.transformer.no_sync_func = own if len(own) > 1 else own[0]
            starts = [part.start_grad_sync for part in found]
            if len(starts) > 1:
                self.transformer.grad_sync_func = starts
        return found

    def _optimizer(self) -> Any:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        o = self.config.train.optimizer
        wanted = OptimizerConfig(
            optimizer="adam", lr=o.lr, weight_decay=o.weight_decay, adam_beta1=o.betas[0], adam_beta2=o.betas[1],
            adam_eps=o.eps, clip_grad=float("inf") if o.clip is None else o.clip, bf16=self.transformer.bf16,
            params_dtype=self.transformer.params_dtype, use_distributed_optimizer=self.ranks.degrees.dp_shard > 1,
        )  # fmt: skip
        return get_megatron_optimizer(wanted, self.model, use_gloo_process_groups=False)

    def train(self, tokens: Tensor, labels: Tensor, samples: range) -> Tensor:
        """See `Engine.train`. tokens, labels: int64 [B, S]."""
        self._mode(training=True)
        if counting_passes(self.config, self.ranks.degrees.dp):
            with counted(self.moe_layers(), self.ranks), torch.no_grad():
                self._run(tokens, labels, samples, forward_only=True)
        for part in self.model:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(tokens, labels, samples, forward_only=False)

    def later_losses(self) -> Tensor:
        """See `Engine.later_losses`: none."""
        return torch.zeros(0, device=self.mesh.device)

    def update(self, rate: float) -> Update:
        """See `Engine.update`."""
        o, gates = self.config.train.optimizer, [layer.gate for layer in self.moe_layers().values()]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = o.weight_decay * group.get("wd_mult", 1.0)
        norm = step(self.optimizer)
        bad: list[str] = []
        if isfinite(norm):
            for gate, total in step_totals(gates, self.ranks):
                gate.after_step(total)
        else:
            for gate in gates:
                gate.skip_step()
            gradients = {piece.name: piece.view(p.main_grad) for p, piece, _ in self.pieces()}  # type: ignore[attr-defined]
            bad = nonfinite(gradients, order=2)
        scalar = partial(torch.full, (), device=self.mesh.device)
        return Update(scalar(norm, dtype=torch.float64), scalar(not isfinite(norm), dtype=torch.bool), lambda: bad)

    def nonfinite(self) -> list[str]:
        """See `Engine.nonfinite`."""
        held = {piece.name: part for _, piece, part in self.pieces()} | self._buffers()
        return [*nonfinite(held), *nonfinite(self._state().slots())]

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor, samples: Sequence[int]) -> Tensor:
        """See `Engine.evaluate`. tokens, labels: int64 [B, S]."""
        self._mode(training=False)
        return self._run(tokens, labels, samples, forward_only=True)

    def _mode(self, training: bool) -> None:
        for part in self.model:
            part.train(training)

    def _run(self, tokens: Tensor, labels: Tensor, samples: Sequence[int], forward_only: bool) -> Tensor:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        t = self.config.train
        marks = self.marks.pack(numbers(tokens, samples), tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        split = (x.split(t.micro_batch) for x in (tokens, labels, positions, marks))
        batches = [_MicroBatch(*parts) for parts in zip(*split, strict=True)]
        streams = [iter(batches) for _ in self.model]
        losses = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=streams if len(streams) > 1 else streams[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(batches),
            seq_length=t.seq_len,
            micro_batch_size=t.micro_batch,
            forward_only=forward_only,
        )
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=tokens.device)
        return total / (t.global_batch * t.seq_len)

    def _forward(self, stream: Iterator[_MicroBatch], part: Any) -> tuple[Tensor, Any]:
        """Run one stage on one micro-batch; Megatron's schedules call it."""
        batch = next(stream)
        counts = batch.labels >= 0
        labels = batch.labels.clamp(min=0)
        out = part(batch.ids, batch.positions, None, labels=labels, padding_mask=batch.marks)
        return out, partial(_loss, counts)

    def moe_layers(self) -> dict[str, MoELayer]:
        """See `Engine.moe_layers`."""
        found = (m for part in self._inner() for m in part.modules() if isinstance(m, NativeLayer))
        return {f"layers.{m.layer}.ffn": m.moe for m in found}

    def gradients(self) -> dict[str, Tensor]:
        """See `Engine.gradients`."""
        if self.ranks.degrees.dp_shard > 1:
            self._gather_gradients()
        parts = ((piece, piece.view(p.main_grad)) for p, piece, _ in self.pieces())  # type: ignore[attr-defined]
        return gathered(parts, self.groups)

    def _gather_gradients(self) -> None:
        """Gather gradients: with a distributed optimizer, each data rank has reduced its own part of their buffers."""
        for part in self.model:
            for buffer in (*part.buffers, *part.expert_parallel_buffers):
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)

    def weights(self) -> dict[str, Tensor]:
        """See `Engine.weights`."""
        found = gathered(((piece, part) for _, piece, part in self.pieces()), self.groups)
        return found | {name: value.cpu().clone() for name, value in self._buffers().items()}

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        self._state().save(folder)

    def load(self, folder: Path) -> set[str]:
        """See `Engine.load`."""
        return self._state().load(folder)

    def _state(self) -> State:
        pieces = [(parameter, piece) for parameter, piece, _ in self.pieces()]
        return State(pieces, self.optimizer, self._buffers(), self.groups.tp.rank() == 0)

    def _buffers(self) -> dict[str, Tensor]:
        layers = self.moe_layers().items()
        return {f"{name}.gate.{key}": value for name, m in layers for key, value in m.gate.state_dict_buffers()}


def _loss(counts_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss over a micro-batch's tokens, where backward starts, and the sum.

    A sum that is not finite makes every gradient NaN, so that all ranks see it in the norm.
    """
    total = (losses_BS.float() * counts_BS).sum()
    one = 1 + 0 * total.detach()
    return total * one / counts_BS.numel(), total.detach()
