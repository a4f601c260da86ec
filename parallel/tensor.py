"""Tensor parallelism of attention, feed-forward, embedding and head, on torch's DTensor (Megatron-LM).

With sequence parallelism (arXiv 2205.05198) the stream between layers, and the norms, are split along
the sequence. MoE layers always work on a slice of the sequence: their tokens would otherwise be
routed tp times.

| module                        | weight          | input → output                             |
|-------------------------------|-----------------|--------------------------------------------|
| embedding                     | vocabulary      | tokens → stream                            |
| norms                         | replicated      | stream → stream                            |
| q, k, v, gate, up             | output features | whole → heads or inner features            |
| o, down                       | input features  | heads or inner features → stream           |
| latent projections and norms  | replicated      | whole → whole                              |
| gate of MoE                   | replicated      | slice of the sequence → same               |
| head                          | vocabulary      | stream → vocabulary slice of the logits    |
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from moesys.config.schema import Config
from moesys.errors import Problem
from moesys.models.parts.axes import Weight
from moesys.models.parts.mixer import Mixer
from moesys.models.parts.moe import MoEFeedForward
from moesys.models.parts.part import Part
from moesys.models.size import weights
from moesys.parallel.cost import Collective, StepShape, buckets
from moesys.parallel.degrees import Degrees

if TYPE_CHECKING:
    from moesys.models.decoder import Decoder
    from moesys.parallel.mesh import ParallelMesh


def check(config: Config, degrees: Degrees) -> list[Problem]:
    """Rules of tensor parallelism that `config` breaks, from the named axes of the weights."""
    tp, m, problems = degrees.tp, config.model, []
    if tp == 1:
        return []
    split: dict[str, int] = {}
    for weight in weights(m, m.vocab_size or tp):
        if (dim := weight.split_by("tp")) is None:
            continue
        split.setdefault(weight.axes[dim].key, weight.axes[dim].count)
    for key, size in split.items():
        if size % tp:
            what = "the shared experts' total inner size" if key.endswith("shared_experts") else key
            problems.append(Problem("parallel.tp", f"tp({tp}) must divide {what}({size})", "choose a common divisor"))
    ranks = degrees.cp * tp
    if (config.parallel.sp or m.moe is not None) and config.train.seq_len % ranks:
        why = "sequence parallelism" if config.parallel.sp else "MoE layers under tp"
        rule = f"cp({degrees.cp}) · tp({tp}) = {ranks} must divide train.seq_len({config.train.seq_len}) for {why}"
        problems.append(Problem("parallel.tp", rule, f"make train.seq_len a multiple of {ranks}"))
    return problems


def shards(weight: Weight, degrees: Degrees) -> int:
    """Ways that tp splits a weight; a bias lies as its weight's output does."""
    return 1 if weight.split_by("tp") is None else degrees.tp


def cost(shape: StepShape) -> list[Collective]:
    """The stream made whole before, and summed after, what is split; sums of gradients; the loss."""
    if shape.degrees.tp == 1:
        return []
    moves = [move for placed in (*shape.blocks, *shape.edges) for move in _stream(shape, placed.part)]
    if shape.stage.last:
        # Of each token, log Σ exp of each slice of the logits and the label's logit, in float32.
        found = 2 * 4 * shape.degrees.tp * shape.sequence_tokens / shape.degrees.cp
        passes = 1 + shape.config.model.predicted + shape.counting
        moves.append(Collective("all_gather", ("tp",), found, shape.micro_batches * passes, small=True))
    return moves + _gradients(shape)


def _stream(shape: StepShape, part: Part) -> list[Collective]:
    """Collectives of a part: in forward before and after its split weights, in backward the other way round.

    Full recomputation repeats those of blocks, save the last one of a block, whose result backward does not need.
    Selective recomputation keeps what is gathered and scattered, and repeats all-reduces.
    """
    t, p, found = shape.config.train, shape.config.parallel, Counter[tuple[str, int, int]]()
    once, full = 1 + shape.counting, int(t.recompute == "full")
    width, predicted = shape.width, shape.config.model.predicted

    def meet(into: int, out: int, sliced: bool, width: int = width, streams: int = 1) -> None:
        """Forward passes that make the input whole, and that sum the output; 0 for none. `streams`: at a time."""
        if sliced:
            found["all_gather", width, streams] += into + bool(out)
            found["reduce_scatter", width, streams] += out + bool(into)
        else:
            found["all_reduce", width, streams] += out + bool(into)

    if isinstance(part, MoEFeedForward):
        if not p.sp:  # a slice of the sequence is cut out of the stream before it, and gathered after it
            found["all_gather", width, 1] += once + 1
        for inner in part.apart():
            # Backward needs what follows shared experts, or they are computed while rows travel.
            travelling = shape.degrees.ep * shape.degrees.etp > 1 and p.dispatch.overlap_shared
            meet(once + full, once + full * (travelling or part.m.shared_mix != "add"), True)
            assert _split(inner)
    elif not part.reads:
        # The embedding's rows have the type of its weight, which FSDP alone makes narrow.
        streams = shape.stage.first + predicted * shape.stage.last
        meet(0, once, p.sp, width if shape.degrees.dp_shard > 1 else 4, streams)
    elif not part.writes:
        meet(1, 0, p.sp, streams=1 + predicted)
        found["all_gather", width, 1] += shape.counting * p.sp
    elif _split(part):
        mixing = isinstance(part, Mixer)
        meet(once + full, once + mixing * (full or (not p.sp and t.recompute == "selective")), p.sp)
    tokens, n = shape.sequence_tokens / shape.degrees.cp, shape.micro_batches
    size = tokens * shape.config.model.hidden
    # A norm over features that are split sums one number per token, in forward and in backward.
    norms = sum(weight.kind == "norm" and weight.split_by("tp") is not None for weight in part.weights())
    passes = norms * (once + (t.recompute != "none") + 1)
    return [
        *(
            Collective(kind, ("tp",), size * each * streams, calls * n)
            for (kind, each, streams), calls in found.items()
        ),
        Collective("all_reduce", ("tp",), 4 * tokens, passes * n, small=True),
    ]


def _split(part: Part) -> bool:
    return any(weight.split_by("tp") is not None for weight in part.weights())


def _gradients(shape: StepShape) -> list[Collective]:
    """Sums of the gradients that are of one rank's tokens or heads, of weights that all tensor ranks hold whole.

    Those of the rank together, save what FSDP manages: it sums each weight's own.
    """
    sharded, each = shape.degrees.dp_shard > 1, shape.config.parallel.sync_gradients == "each"
    moves = []
    if shape.leads:
        sizes = [4.0 * w.numel for some in shape.rank_weights for w in some if _partial(shape, w, not sharded)]
        moves += [Collective("all_reduce", ("tp",), size, 1) for size in buckets(sizes)]
    norms = [w for w in shape.weights() if w.normalized and shape.trained(w)]
    moves += [Collective("all_reduce", ("tp",), 4.0 * w.shape[0], shape.micro_batches, small=True) for w in norms]
    if sharded:
        # What several micro-batches have added up is float32.
        narrow = each or (shape.micro_batches == 1 and shape.degrees.pp == 1)
        width, sums = shape.width if narrow else 4, shape.micro_batches if each else 1
        own = [w for w in shape.weights() if _partial(shape, w, True) and not w.router]
        moves += [Collective("all_reduce", ("tp",), float(width * w.numel), sums) for w in own]
    return moves


def _partial(shape: StepShape, weight: Weight, others: bool) -> bool:
    """Whether a gradient is a partial sum, of a router or of one of the `others`.

    Not so of biases that all ranks hold: sums are whole when these are added. With sp alone of what works
    on the stream.
    """
    if weight.routed or weight.split_by("tp") is not None or not (weight.router or others) or not shape.trained(weight):
        return False
    if weight.on_stream and not weight.router:
        return shape.config.parallel.sp
    return weight.router or weight.kind != "bias"


def apply(model: Decoder, mesh: ParallelMesh, config: Config) -> Decoder:
    """Split the weights over the tp axis; the stream stays a plain tensor between blocks."""
    axis = mesh.mesh("tp")
    if axis is None:
        return model
    from moesys.parallel.tensor_styles import parallelize

    return parallelize(model, axis, config.parallel.sp)
