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
from moesys.models.size import Weight
from moesys.parallel.cost import Collective, StepShape
from moesys.parallel.degrees import Degrees

if TYPE_CHECKING:
    from moesys.models.decoder import Decoder
    from moesys.parallel.mesh import ParallelMesh

SHARDED = {
    **dict.fromkeys(
        ("embed", "head", "q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj"), 0
    ),
    **dict.fromkeys(("o_proj", "down_proj"), 1),
}
"""Modules whose weight tp splits, with the dim; all others are replicated over tp."""


def check(config: Config, degrees: Degrees) -> list[Problem]:
    tp, m, problems = degrees.tp, config.model, []
    if tp == 1:
        return []
    a = m.attention
    sizes = {"model.attention.heads": a.heads}
    if a.kind == "gqa":
        sizes["model.attention.kv_heads"] = a.kv_heads or a.heads
    if m.ffn_hidden is not None and not all(m.is_moe(i) for i in range(m.layers)):
        sizes["model.ffn_hidden"] = m.ffn_hidden
    if m.moe is not None and m.moe.shared_experts:
        sizes["model.moe.shared_experts"] = m.moe.shared_width
    if m.vocab_size is not None:
        sizes["model.vocab_size"] = m.vocab_size
    for key, size in sizes.items():
        if size % tp:
            what = "the shared experts' total inner size" if key.endswith("shared_experts") else key
            problems.append(Problem("parallel.tp", f"tp({tp}) must divide {what}({size})", "choose a common divisor"))
    ranks = degrees.cp * tp
    if (config.parallel.sp or m.moe is not None) and config.train.seq_len % ranks:
        why = "sequence parallelism" if config.parallel.sp else "MoE layers under tp"
        rule = f"cp({degrees.cp}) · tp({tp}) = {ranks} must divide train.seq_len({config.train.seq_len}) for {why}"
        problems.append(Problem("parallel.tp", rule, f"make train.seq_len a multiple of {ranks}"))
    if a.qk_norm == "full" and a.kind == "gqa":
        rule = f"a norm over all heads together (qk_norm: full) cannot be split over tp({tp})"
        problems.append(Problem("parallel.tp", rule, "set tp: 1, or qk_norm: head"))
    return problems


def shards(weight: Weight, degrees: Degrees) -> int:
    """Ways that tp splits a weight; a bias lies as its weight's output does."""
    dim = SHARDED.get(weight.module)
    whole = dim is None or (weight.name.endswith(".bias") and dim == 1)
    return 1 if whole else degrees.tp


def cost(shape: StepShape) -> list[Collective]:
    """The stream made whole before, and summed after, each attention and dense feed-forward."""
    m, calls = shape.config.model, shape.micro_batches
    size = shape.sequence_tokens / shape.degrees.cp * m.hidden * shape.width
    dense = sum(not m.is_moe(i) or (m.moe is not None and m.moe.shared_experts > 0) for i in shape.stage.layers)
    blocks = shape.layers + dense
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
