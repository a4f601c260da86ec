"""An estimate of what a rank keeps for backward; needs no torch.

Parts of the model say what they keep of a token (`moesys.models.parts`). Here it is split over the ranks, and
multiplied by the micro-batches that a pipeline has in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from moesys.config.schema import Config
from moesys.models.parts.axes import SPLIT_BY, Kept
from moesys.models.parts.part import Part
from moesys.parallel.cost import StepShape
from moesys.parallel.in_flight import StageBytes, actions, fullest
from moesys.parallel.pipeline import MULTI


def activations(shapes: list[StepShape]) -> float:
    """Bytes kept for backward at the fullest moment, with what a pipeline holds of the streams that stages send."""
    if shapes[0].degrees.pp == 1:
        return sum(_stage(s) + _head(s) for s in shapes)
    return _megatron_pipeline(shapes) if shapes[0].config.engine == "megatron" else _pipeline(shapes)


def _pipeline(shapes: list[StepShape]) -> float:
    """Those of a rank with torch's schedules.

    They receive each micro-batch's stream and its gradient into buffers of its own, which stay; so do, since the first
    evaluation, those of its passes. What is sent is held until the next pass has ended, or by schedules of several
    stages until the end of the step.
    """
    config, n, pp = shapes[0].config, shapes[0].micro_batches, shapes[0].degrees.pp
    schedule, rank, u = config.parallel.pp_schedule, shapes[0].stage.index % pp, _stream(shapes[0])
    ends = [(s.stage.first, s.stage.last) for s in shapes]
    once = 1 + (config.train.eval_every > 0)
    buffers = n * u * sum(once * (not first) + (not last) for first, last in ends)
    later = 0.0
    if schedule == "1f1b" and n > pp - rank:
        (shape,), ((first, last),) = shapes, ends
        later = u * ((not first) + (not last)) + (_logits(shape) if last else 0.0)
    order = actions(schedule, pp, config.parallel.pp_virtual, n, rank)
    return buffers + later + fullest(order, [_stage_bytes(s) for s in shapes])


def _stage_bytes(shape: StepShape) -> StageBytes:
    """What a micro-batch adds to the buffers: what its stage keeps, its output, and the gradient of its input."""
    first, last, u = shape.stage.first, shape.stage.last, _stream(shape)
    kept = _stage(shape) + (_head(shape) if last else u)
    if not first and not _widened(shape):
        kept -= u  # what the first norm, or recomputation, begins with lies in a buffer
    schedule = shape.config.parallel.pp_schedule
    gradients = 0.0
    if schedule == "zero-bubble" and not first:  # the first stage needs no gradient of its input
        gradients = sum(_split_gradients(placed.part, shape) for placed in (*shape.blocks, *shape.edges))
        gradients += u * last
    return StageBytes(kept, gradients, u * ((not first) + (not last)) if schedule in MULTI else 0.0)


def _split_gradients(part: Part, shape: StepShape) -> float:
    """Bytes of the gradients of what weights give, which a split backward keeps between its parts.

    The last of a stage's is the gradient that was received; in its place counts that of the stage's input. The head's
    lies in place of the logits.
    """
    tokens = shape.sequence_tokens / shape.degrees.cp
    return tokens * _per_token(part.results(shape) if part.writes or not part.reads else (), shape)


def _stream(shape: StepShape) -> float:
    """Bytes of the stream of one micro-batch between blocks, as stages send it."""
    d = shape.degrees
    ways = d.cp * (d.tp if shape.config.parallel.sp else 1)
    return shape.sequence_tokens / ways * shape.config.model.hidden * shape.width


def _widened(shape: StepShape) -> bool:
    """Whether the norms of the stream keep float32 copies of it instead of itself."""
    p = shape.config.parallel
    return shape.degrees.tp > 1 and p.sp and shape.width < 4 and shape.config.train.recompute == "none"


def _megatron_pipeline(shapes: list[StepShape]) -> float:
    """Those of a rank with Megatron's schedules, which free each stream when it has been sent."""
    p, n = shapes[0].config.parallel, shapes[0].micro_batches
    order = actions(p.pp_schedule, p.pp, p.pp_virtual, n, shapes[0].stage.index % p.pp)
    return fullest(order, [StageBytes(_stage(s) + (_head(s) if s.stage.last else 0.0)) for s in shapes])


def _stage(shape: StepShape) -> float:
    config, d = shape.config, shape.degrees
    tokens, whole = shape.sequence_tokens / d.cp, replace(shape, config=_without_recomputation(shape.config))
    # Recomputation begins with the stream that enters a block; those of multi-token prediction have two inputs.
    inputs = shape.layers + config.model.predicted * shape.stage.last
    beside = _stream(shape) * inputs
    if config.train.recompute == "full":
        return beside + sum(part_bytes(placed.part, tokens, whole) for placed in shape.blocks if not placed.repeated)
    found = sum(part_bytes(placed.part, tokens, shape if placed.repeated else whole) for placed in shape.blocks)
    return found + (_narrowed(shape, False) if config.train.recompute == "none" else beside)


def part_bytes(part: Part, tokens: float, shape: StepShape) -> float:
    """Bytes that a part keeps for backward of `tokens` tokens of this context rank."""
    selective = shape.config.train.recompute == "selective"
    every = (*part.kept(shape.config, shape), *part.products(), *_input(part, shape))
    return tokens * _per_token((kept for kept in every if (kept.selective if selective else kept.plain)), shape)


def _per_token(every: Iterable[Kept], shape: StepShape) -> float:
    """Bytes per token on this rank."""
    tp = shape.degrees.tp
    ways = {"stream": tp if shape.config.parallel.sp else 1, "tokens": tp}
    return sum(
        kept.elements * (kept.width or shape.width) / ways.get(kept.axis, tp if SPLIT_BY.get(kept.axis) == "tp" else 1)
        for kept in every
    )


def _input(part: Part, shape: StepShape) -> Iterator[Kept]:
    """The input of split weights, whole on every tensor rank; selective recomputation keeps what makes it whole."""
    hidden = shape.config.model.hidden
    if part.reads and part.writes and any(weight.split_by("tp") is not None for weight in part.weights()):
        yield Kept(hidden, "whole")
        if shape.degrees.tp > 1 and shape.config.parallel.sp:  # what was gathered, and this rank's part of the sums
            yield Kept(hidden, "whole", plain=False, selective=True)
            yield Kept(hidden, "stream", plain=False, selective=True)


def _narrowed(shape: StepShape, edge: bool) -> float:
    """Bytes of copies of weights in the type of the run, which products with split weights keep, unless FSDP casts."""
    d = shape.degrees
    if shape.width == 4:
        return 0.0
    split = d.tp > 1 and d.dp_shard == 1
    own = [
        w
        for w in shape.weights()
        if (w.narrowed and shape.data_shards(w, d) == 1)
        or (split and w.kind == "matrix" and not (w.routed or w.router or w.frozen))
    ]
    return shape.width * sum(shape.local(w) for w in own if (w.makes_logits if edge else w.layer is not None))


def _logits(shape: StepShape) -> float:
    """Those of a micro-batch, which become their gradient, of each depth of multi-token prediction."""
    tokens, outputs = shape.sequence_tokens / shape.degrees.cp, 1 + shape.config.model.predicted
    return outputs * shape.width * tokens * shape.vocab_size / shape.degrees.tp


def _head(shape: StepShape) -> float:
    """What a micro-batch keeps at the end: inputs of norm and head, and logits.

    Multi-token prediction has the head's inputs and logits of each depth.
    """
    tokens, outputs = shape.sequence_tokens / shape.degrees.cp, 1 + shape.config.model.predicted
    inputs = outputs * shape.width * tokens * shape.config.model.hidden
    whole = replace(shape, config=_without_recomputation(shape.config))
    return (
        inputs
        + _logits(shape)
        + sum(
            part_bytes(placed.part, tokens, whole) for placed in shape.edges if placed.part.writes and placed.part.reads
        )
        + _narrowed(shape, True)
    )


def _without_recomputation(config: Config) -> Config:
    """The run as it computes what lies beside blocks."""
    return config.model_copy(update={"train": config.train.model_copy(update={"recompute": "none"})})
