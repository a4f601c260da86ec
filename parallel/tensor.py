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

from typing import TYPE_CHECKING

from moesys.config.schema import Config
from moesys.errors import Problem
from moesys.models.parts.axes import Weight
from moesys.models.size import weights
from moesys.parallel.cost import Collective, StepShape
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
    whole_norms: dict[str, Problem] = {}
    for weight in weights(m, m.vocab_size or tp):
        if (dim := weight.split_by("tp")) is None:
            continue
        split.setdefault(weight.axes[dim].key, weight.axes[dim].count)
        if weight.kind == "norm":
            section = weight.axes[dim].key.rpartition(".")[0]
            rule = f"a norm over all heads together (qk_norm: full) cannot be split over tp({tp})"
            whole_norms.setdefault(section, Problem("parallel.tp", rule, "set tp: 1, or qk_norm: head"))
    for key, size in split.items():
        if size % tp:
            what = "the shared experts' total inner size" if key.endswith("shared_experts") else key
            problems.append(Problem("parallel.tp", f"tp({tp}) must divide {what}({size})", "choose a common divisor"))
    ranks = degrees.cp * tp
    if (config.parallel.sp or m.moe is not None) and config.train.seq_len % ranks:
        why = "sequence parallelism" if config.parallel.sp else "MoE layers under tp"
        rule = f"cp({degrees.cp}) · tp({tp}) = {ranks} must divide train.seq_len({config.train.seq_len}) for {why}"
        problems.append(Problem("parallel.tp", rule, f"make train.seq_len a multiple of {ranks}"))
    return problems + list(whole_norms.values())


def shards(weight: Weight, degrees: Degrees) -> int:
    """Ways that tp splits a weight; a bias lies as its weight's output does."""
    return 1 if weight.split_by("tp") is None else degrees.tp


def cost(shape: StepShape) -> list[Collective]:
    """The stream made whole before, and summed after, each attention and dense feed-forward."""
    m, calls = shape.config.model, shape.micro_batches
    size = shape.sequence_tokens / shape.degrees.cp * m.hidden * shape.width
    blocks = sum(any(w.split_by("tp") is not None for w in placed.part.weights()) for placed in shape.blocks)
    if not shape.config.parallel.sp:
        return [Collective("all_reduce", ("tp",), size, (shape.forwards + 1) * blocks * calls)]
    # forward: gather before, scatter after; backward: the other way round
    kinds = ("all_gather", "reduce_scatter")
    return [Collective(kind, ("tp",), size, (shape.forwards + 1) * blocks * calls) for kind in kinds]


def apply(model: Decoder, mesh: ParallelMesh, config: Config) -> Decoder:
    """Split the weights over the tp axis; the stream stays a plain tensor between blocks."""
    axis = mesh.mesh("tp")
    if axis is None:
        return model
    from moesys.parallel.tensor_styles import parallelize

    return parallelize(model, axis, config.parallel.sp)
