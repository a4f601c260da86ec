"""An estimate of the memory that one rank needs, by kind; needs no torch.

It counts what must be there: weights, gradients, optimizer state, activations kept for backward and
the buffers that FSDP gathers. It leaves out fragmentation, workspaces and communication libraries'
own buffers, and takes routing as balanced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

from moesys.config.schema import Config
from moesys.models.parts.axes import SPLIT_BY, Kept
from moesys.models.parts.part import Part
from moesys.parallel.cost import StepShape
from moesys.parallel.pipeline import MULTI

EDGES = ("embed.weight", "head.weight")
"""Weights beside the blocks that FSDP gathers apart."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return sum(asdict(self).values())


def estimate(shapes: list[StepShape]) -> Memory:
    """Memory of a rank that holds these stages of the model."""
    if shapes[0].config.engine == "megatron":
        return _megatron(shapes)
    held = sum(s.held() for s in shapes)
    sharded = shapes[0].degrees.dp_shard > 1
    trained = sum(s.held(trained=True) for s in shapes)
    unsharded = sum(s.held(unsharded=True, trained=True) for s in shapes) - trained if sharded else 0.0
    accumulating = 0.0
    if sharded:
        # FSDP sums the gradients of one block at a time, whole and in float32, and between micro-batches either keeps
        # those of all blocks so or has summed them.
        keeps = shapes[0].micro_batches > 1 and shapes[0].config.parallel.sync_gradients != "each"
        summed = max(s.held(layer=layer, unsharded=True, trained=True) for s in shapes for layer in s.stage.layers)
        accumulating = 4 * ((unsharded if keeps else 0.0) + summed)
    gathered = _gathered(shapes) * shapes[0].width if sharded else 0.0
    return Memory(4 * held, 4 * trained + accumulating, 8 * trained, activations(shapes), gathered)


def _gathered(shapes: list[StepShape]) -> float:
    """Elements of weights that are whole at the fullest moment, from what FSDP gathers.

    With a pipeline all of the rank's; else those of two neighbours (blocks, embedding, head), since one computes while
    the next is gathered, and what belongs to no block.
    """
    if shapes[0].degrees.pp > 1:
        return sum(s.held(unsharded=True) for s in shapes)
    (shape,) = shapes
    tied = shape.config.model.tie_embeddings
    edge = {name: shape.held(unsharded=True, where=lambda w, n=name: w.name == n) for name in EDGES}  # type: ignore[misc]
    blocks = [shape.held(layer=layer, unsharded=True) for layer in shape.stage.layers]
    order = blocks if tied else [edge["embed.weight"], *blocks, edge["head.weight"]]
    throughout = edge["embed.weight"] if tied else 0.0
    return throughout + max((a + b for a, b in pairwise(order)), default=sum(order))


def _megatron(shapes: list[StepShape]) -> Memory:
    """Weights in the type of computation, gradients in float32, both whole; the distributed optimizer shards its own.

    In bfloat16 the optimizer also keeps float32 weights.
    """
    whole, width = sum(s.held(unsharded=True) for s in shapes), shapes[0].width
    kept = sum(s.held() for s in shapes) * (8 if width == 4 else 12)
    return Memory(width * whole, 4 * whole, kept, activations(shapes), 0.0)


def activations(shapes: list[StepShape]) -> float:
    """Bytes kept for backward at the fullest moment."""
    pairs = in_flight(shapes[0])
    mean = sum(_stage(s) for s in shapes) / len(shapes)
    return pairs * mean + sum(_head(s) for s in shapes if s.stage.last)


def in_flight(shape: StepShape) -> int:
    """Most (stage, micro-batch) pairs that a rank has run forward but not yet backward."""
    p, n = shape.config.parallel, shape.micro_batches
    if p.pp == 1:
        return 1
    if p.pp_schedule == "gpipe":
        return n
    rank = shape.stage.index % p.pp
    if p.pp_schedule in MULTI:
        return min(n * p.pp_virtual, 2 * (p.pp - rank - 1) + (p.pp_virtual - 1) * p.pp + 1)
    return min(n, p.pp - rank)


def _stage(shape: StepShape) -> float:
    config, d = shape.config, shape.degrees
    tokens, whole = shape.sequence_tokens / d.cp, replace(shape, config=_without_recomputation(shape.config))
    # Recomputation begins with the stream that enters a block; those of multi-token prediction have two inputs.
    inputs = shape.layers + config.model.predicted * shape.stage.last
    beside = tokens * config.model.hidden / (d.tp if config.parallel.sp else 1) * shape.width * inputs
    if config.train.recompute == "full":
        return beside + sum(part_bytes(placed.part, tokens, whole) for placed in shape.blocks if not placed.repeated)
    found = sum(part_bytes(placed.part, tokens, shape if placed.repeated else whole) for placed in shape.blocks)
    return found + (_narrowed(shape, False) if config.train.recompute == "none" else beside)


def part_bytes(part: Part, tokens: float, shape: StepShape) -> float:
    """Bytes that a part keeps for backward of `tokens` tokens of this context rank."""
    config, tp = shape.config, shape.degrees.tp
    selective = config.train.recompute == "selective"
    ways = {"stream": tp if config.parallel.sp else 1, "tokens": tp}
    total = 0.0
    for kept in (*part.kept(config, shape), *part.products(), *_input(part, shape)):
        if kept.selective if selective else kept.plain:
            split = ways.get(kept.axis, tp if SPLIT_BY.get(kept.axis) == "tp" else 1)
            total += kept.elements * (kept.width or shape.width) / split
    return tokens * total


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
    head = "embed.weight" if shape.config.model.tie_embeddings else "head.weight"
    split = d.tp > 1 and d.dp_shard == 1
    own = [
        w
        for w in shape.weights()
        if (w.narrowed and shape.data_shards(w, d) == 1)
        or (split and w.kind == "matrix" and not (w.routed or w.router or w.frozen))
    ]
    return shape.width * sum(shape.local(w) for w in own if (w.name == head if edge else w.layer is not None))


def _head(shape: StepShape) -> float:
    """What a micro-batch keeps at the end: inputs of norm and head, and logits, which become their gradient.

    Multi-token prediction has the head's inputs and logits of each depth.
    """
    tokens, outputs = shape.sequence_tokens / shape.degrees.cp, 1 + shape.config.model.predicted
    logits = outputs * shape.width * tokens * (shape.config.model.hidden + shape.vocab_size / shape.degrees.tp)
    whole = replace(shape, config=_without_recomputation(shape.config))
    return (
        logits
        + sum(
            part_bytes(placed.part, tokens, whole) for placed in shape.edges if placed.part.writes and placed.part.reads
        )
        + _narrowed(shape, True)
    )


def _without_recomputation(config: Config) -> Config:
    """The run as it computes what lies beside blocks."""
    return config.model_copy(update={"train": config.train.model_copy(update={"recompute": "none"})})
