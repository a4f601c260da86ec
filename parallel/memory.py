"""An estimate of the memory that one rank needs, by kind; needs no torch.

It counts what must be there: weights, gradients, optimizer state, activations kept for backward and
the buffers that FSDP gathers. It leaves out fragmentation, workspaces and communication libraries'
own buffers, and takes routing as balanced.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

from moesys.parallel.activations import activations
from moesys.parallel.cost import StepShape


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
    embedding = shape.held(unsharded=True, where=lambda w: w.looked_up)
    head = shape.held(unsharded=True, where=lambda w: w.makes_logits)
    blocks = [shape.held(layer=layer, unsharded=True) for layer in shape.stage.layers]
    order = blocks if tied else [embedding, *blocks, head]
    throughout = embedding if tied else 0.0
    return throughout + max((a + b for a, b in pairwise(order)), default=sum(order))


def _megatron(shapes: list[StepShape]) -> Memory:
    """Weights in the type of computation, gradients in float32, both whole; the distributed optimizer shards its own.

    In bfloat16 the optimizer also keeps float32 weights.
    """
    whole, width = sum(s.held(unsharded=True) for s in shapes), shapes[0].width
    kept = sum(s.held() for s in shapes) * (8 if width == 4 else 12)
    return Memory(width * whole, 4 * whole, kept, activations(shapes), 0.0)
