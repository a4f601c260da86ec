"""Running the stages of a rank: one interface with and without a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from moesys.parallel.cost import Stage
from moesys.parallel.mesh import ParallelMesh
from moesys.parallel.pipeline import MULTI

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits of one micro-batch, labels) → this rank's share of the loss, a scalar."""

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}


class Whole:
    """A model that is one stage: micro-batches one after another."""

    def __init__(self, model: nn.Module, micro_batches: int, loss: LossFunction):
        self.model, self.micro_batches, self.loss = model, micro_batches, loss

    def train(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward of [micro_batches · b, S]: the sum of the losses.

        tokens int64 […, S, 2]: each token's number in the run and its id; labels int64 […, S].
        """
        losses = []
        for number, (x, y) in enumerate(self._pairs(tokens, labels)):
            if isinstance(self.model, FSDPModule):
                last = number == self.micro_batches - 1
                self.model.set_is_last_backward(last)
                self.model.set_requires_gradient_sync(last)
            loss = self.loss(self.model(x[..., 1], x), y)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses, shapes as in `train`, forward only."""
        return torch.stack([self.loss(self.model(x[..., 1], x), y) for x, y in self._pairs(tokens, labels)]).sum()

    def _pairs(self, tokens: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(tokens.chunk(self.micro_batches), labels.chunk(self.micro_batches), strict=True)


class Pipelined:
    """The stages of this rank under one of torch's pipeline schedules."""

    def __init__(
        self,
        parts: list[nn.Module],
        stages: list[Stage],
        schedule: str,
        micro_batches: int,
        loss: LossFunction,
        mesh: ParallelMesh,
        shapes: list[tuple[Tensor, Tensor]],
    ):
        """`shapes`: (input, output) of each stage for one micro-batch, on the meta device."""
        self.stages, self.mesh = stages, mesh
        group = mesh.group("pp")
        wrapped = [
            PipelineStage(part, s.index, s.count, mesh.device, input_args=x, output_args=y, group=group)
            for part, s, (x, y) in zip(parts, stages, shapes, strict=True)
        ]
        single = schedule not in MULTI
        # The loss is divided by the global token count already: nothing is left to scale.
        self.schedule = SCHEDULES[schedule](
            wrapped[0] if single else wrapped, n_microbatches=micro_batches, loss_fn=loss, scale_grads=False
        )

    def _run(self, step: Callable, tokens: Tensor, labels: Tensor) -> Tensor:
        losses: list[Tensor] = []
        first, last = self.stages[0].first, self.stages[-1].last
        ids = (tokens[..., 1].contiguous(),) if first else ()
        # Kept to be returned, logits of all micro-batches would fill the last stage.
        scores = {"target": labels if last else None, "losses": losses if last else None, "return_outputs": False}
        step(*ids, **scores, tokens_BS2=tokens)
        return torch.stack([x.detach() for x in losses]).sum() if losses else torch.zeros((), device=tokens.device)

    def train(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """As `Whole.train`; zero on ranks without the last stage."""
        return self._run(self.schedule.step, tokens, labels)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """As `Whole.evaluate`; zero on ranks without the last stage."""
        return self._run(self.schedule.eval, tokens, labels)
