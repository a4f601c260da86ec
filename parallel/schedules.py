"""Running the stages of a rank: one interface with and without a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
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

LastBackward = Callable[[int], AbstractContextManager[None]]
"""Context of the last backward pass of a step through the part of a number (`Gradients.last_backward`)."""

StageShapes = list[tuple[Tensor, Tensor]]
"""(input, output) of each stage for one micro-batch, on the meta device."""

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}


class Whole:
    """A model that is one stage: micro-batches one after another.

    `each`: FSDP sums the gradients of each micro-batch over the shards, not those of all at the end.
    """

    def __init__(
        self, model: nn.Module, micro_batches: int, loss: LossFunction, last_backward: LastBackward, each: bool
    ):
        self.model, self.micro_batches, self.loss = model, micro_batches, loss
        self.last_backward, self.each = last_backward, each

    def train(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward of [micro_batches · b, S]: the sum of the losses.

        tokens int64 […, S, 2]: each token's number in the run and its id; labels int64 […, S]. With multi-token
        prediction tokens and labels are those of `Composed._mine`.
        """
        losses = []
        for number, (x, y) in enumerate(self._pairs(tokens, labels)):
            last = number == self.micro_batches - 1
            if isinstance(self.model, FSDPModule):
                self.model.set_is_last_backward(last)
                self.model.set_requires_gradient_sync(last or self.each)
                self.model.set_requires_all_reduce(last)
            loss = self.loss(self.model(x[..., 1], x), y)
            with self.last_backward(0) if last else nullcontext():
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses, shapes as in `train`, forward only. tokens int64 [B, S, 2], labels int64 [B, S]."""
        return torch.stack([self.loss(self.model(x[..., 1], x), y) for x, y in self._pairs(tokens, labels)]).sum()

    def _pairs(self, tokens: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(tokens.chunk(self.micro_batches), labels.chunk(self.micro_batches), strict=True)


class TorchStage(PipelineStage):
    """A stage that enters `last_backward` for its last backward pass.

    `each` as for `Whole`: torch's stages ask FSDP for one sum at the end of a step, and this class overrides them.
    """

    def __init__(self, part: nn.Module, *arguments: Any, last_backward: Callable[[], Any], each: bool, **more: Any):
        super().__init__(part, *arguments, **more)
        self.last_backward = last_backward
        self.summing = part if each and isinstance(part, FSDPModule) else None
        if self.summing is not None:
            self.summing.set_requires_gradient_sync(True)
            vars(part)["set_requires_gradient_sync"] = lambda *_, **__: None

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        """Backward of one micro-batch, as torch's; the last one if `last_backward`."""
        if self.summing is not None:
            self.summing.set_requires_all_reduce(last_backward)
        with self.last_backward() if last_backward else nullcontext():
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward=last_backward)


def gathered_once(actions: list[Any]) -> list[Any]:
    """A rank's actions, in which each stage's weights are gathered once, when first needed, and kept to the end.

    torch keeps the weights of three stages at a time and gathers the others repeatedly; it has no option for this.
    """
    gathers: dict[int, int] = {}
    frees: dict[int, int] = {}
    for number, action in enumerate(actions):
        if action.computation_type.name == "UNSHARD":
            gathers.setdefault(action.stage_index, number)
        elif action.computation_type.name == "RESHARD":
            frees[action.stage_index] = number
    kept = {*gathers.values(), *frees.values()}
    return [
        action
        for number, action in enumerate(actions)
        if number in kept or action.computation_type.name not in ("UNSHARD", "RESHARD")
    ]


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
        shapes: tuple[StageShapes, StageShapes],
        last_backward: LastBackward,
        each: bool,
    ):
        """`shapes`: in training and in evaluation. `each` as for `Whole`."""
        self.stages, self.mesh = stages, mesh
        group, single = mesh.group("pp"), schedule not in MULTI

        def make(shapes: StageShapes) -> Any:
            wrapped = [
                TorchStage(
                    part, s.index, s.count, mesh.device, input_args=x, output_args=y, group=group,
                    last_backward=partial(last_backward, number), each=each,
                )
                for number, (part, s, (x, y)) in enumerate(zip(parts, stages, shapes, strict=True))
            ]  # fmt: skip
            # The loss is divided by the global token count already: nothing is left to scale.
            made = SCHEDULES[schedule](
                wrapped[0] if single else wrapped, n_microbatches=micro_batches, loss_fn=loss, scale_grads=False
            )
            if not single:
                orders = made.pipeline_order_with_comms
                orders[made.rank] = gathered_once(orders[made.rank])
            return made

        # One schedule each: stages that switch between training and evaluation negotiate shapes at every switch.
        self._training, self._evaluation = map(make, shapes)

    def _run(self, step: Callable, tokens: Tensor, labels: Tensor) -> Tensor:
        losses: list[Tensor] = []
        first, last = self.stages[0].first, self.stages[-1].last
        ids = (tokens[..., 1].contiguous(),) if first else ()
        target = labels if last else None
        # The logits of all micro-batches together would be the largest tensor of the run.
        step(*ids, target=target, losses=losses if last else None, tokens_BS2=tokens, return_outputs=False)
        return torch.stack([x.detach() for x in losses]).sum() if losses else torch.zeros((), device=tokens.device)

    def train(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses, as `Whole.train`; zero on ranks without the last stage.

        tokens int64 [B, S, 2], labels int64 [B, S].
        """
        return self._run(self._training.step, tokens, labels)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses, as `Whole.evaluate`; zero on ranks without the last stage.

        tokens int64 [B, S, 2], labels int64 [B, S].
        """
        return self._run(self._evaluation.eval, tokens, labels)
