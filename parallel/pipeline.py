"""Pipeline parallelism: stages of consecutive layers, and the order in which they work.

The schedules are those of `torch.distributed.pipelining`: GPipe, 1F1B, interleaved 1F1B, and the
zero-bubble schedule (arXiv 2401.10241), which splits backward into its parts for inputs and weights.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate

from moesys.config.schema import Config, ModelConfig
from moesys.errors import Problem
from moesys.models.parts.axes import Weight
from moesys.models.size import flops_per_token
from moesys.parallel.cost import Collective, Stage, StepShape
from moesys.parallel.degrees import Degrees
from moesys.words import plural

MULTI = ("interleaved-1f1b", "zero-bubble")
"""Schedules that run several stages per rank."""


def stages(config: Config, vocab_size: int) -> list[Stage]:
    """All stages of the model, first to last; stage s runs on pipeline rank s mod pp."""
    count = config.parallel.pp * config.parallel.pp_virtual
    split = config.parallel.pp_split
    sizes = balanced(config.model, vocab_size, config.train.seq_len, count) if split == "auto" else tuple(split)
    ends = list(accumulate(sizes))
    ends[-1], sizes = ends[-1] + config.model.predicted, (*sizes[:-1], sizes[-1] + config.model.predicted)
    return [Stage(i, count, range(end - size, end)) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))]


def balanced(model: ModelConfig, vocab_size: int, seq_len: int, count: int) -> tuple[int, ...]:
    """Layers per stage such that the largest estimated cost of a stage is least; at least one each.

    Cost is FLOPs: those of multi-token prediction and of the head weigh on the last stage, so that it gets fewer
    layers.
    """
    flops = flops_per_token(model, vocab_size, seq_len)
    blocks = [flops[f"layers.{i}"] for i in range(model.blocks)]
    return divided(tuple(blocks[: model.depth]), sum(blocks[model.depth :]) + flops["head"], count)


@cache
def divided(block_costs: tuple[float, ...], head_cost: float, count: int) -> tuple[int, ...]:
    """Blocks in each of `count` consecutive stages such that the costliest stage costs least."""
    layers = len(block_costs)
    if count == 1:
        return (layers,)
    import numpy as np  # takes a fifth of the time in which a file is checked

    prefix = np.array([0.0, *accumulate(block_costs)])
    # Of the first n layers in the stages so far: the least possible cost of the costliest stage, and the place of the
    # division that has it among those of all n, in the order of their sizes (smaller first stages come first).
    cost, place = np.full(layers + 1, np.inf), np.full(layers + 1, layers + 1)
    cost[0], place[0] = 0.0, 0
    begins = np.zeros((count, layers + 1), np.int64)
    for stage in range(count):
        last = stage == count - 1
        following = np.full(layers + 1, np.inf)
        order = []
        for end in [layers] if last else range(stage + 1, layers - (count - stage - 1) + 1):
            costs = np.maximum(cost[stage:end], prefix[end] - prefix[stage:end] + (head_cost if last else 0.0))
            equal = stage + np.flatnonzero(costs == costs.min())
            begin = begins[stage, end] = equal[place[equal].argmin()]
            following[end] = costs.min()
            order.append((int(place[begin]), end - int(begin), end))
        cost = following
        place = np.full(layers + 1, layers + 1)
        for number, (_, _, end) in enumerate(sorted(order)):
            place[end] = number
    ends = [layers]
    for stage in reversed(range(count)):
        ends.append(int(begins[stage, ends[-1]]))
    return tuple(end - begin for begin, end in zip(reversed(ends[1:]), reversed(ends[:-1]), strict=True))


def check(config: Config, degrees: Degrees) -> list[Problem]:
    """Rules of pipeline parallelism that `config` breaks."""
    p, layers, problems = config.parallel, config.model.depth, []
    count = p.pp * p.pp_virtual
    if p.pp_virtual > 1 and p.pp == 1:
        problems.append(Problem("parallel.pp_virtual", "needs pipeline stages, and pp is 1", "set pp_virtual: 1"))
    if p.pp == 1:
        return problems
    if count > layers:
        rule = f"pp({p.pp}) · pp_virtual({p.pp_virtual}) = {count} stages need as many of model.layers({layers})"
        problems.append(Problem("parallel.pp", rule, "use fewer stages or more layers"))
    if p.pp_split != "auto" and (len(p.pp_split) != count or sum(p.pp_split) != layers):
        rule = (
            f"needs {count} numbers (pp · pp_virtual) with the sum of model.layers({layers}); "
            f"these are {len(p.pp_split)} with the sum {sum(p.pp_split)}"
        )
        problems.append(Problem("parallel.pp_split", rule, "or set it to auto"))
    if p.pp_virtual > 1 and p.pp_schedule not in MULTI:
        rule = f"{p.pp_schedule} runs one stage per rank, and pp_virtual is {p.pp_virtual}"
        problems.append(Problem("parallel.pp_schedule", rule, "use interleaved-1f1b or zero-bubble, or pp_virtual: 1"))
    problems += _zero_bubble(config, degrees) if p.pp_schedule == "zero-bubble" else []
    return problems + _micro_batches(config, degrees)


def _zero_bubble(config: Config, degrees: Degrees) -> list[Problem]:
    problems = []
    if degrees.dp_shard > 1:
        rule = (
            f"does not go with sharded data (dp_shard is {degrees.dp_shard}): the split backward looks "
            "parameters up by their place in the graph, which FSDP2 replaces"
        )
        problems.append(Problem("parallel.pp_schedule", rule, "set dp_shard: 1, or pp_schedule: interleaved-1f1b"))
    model = config.model
    if model.mtp is not None and (model.mtp.depth > 1 or model.tie_embeddings):
        rule = (
            "goes with multi-token prediction of depth 1, and with a head of its own: the split backward cannot use a "
            "weight in two places of a stage, one behind the other"
        )
        problems.append(Problem("parallel.pp_schedule", rule, "set pp_schedule: 1f1b or interleaved-1f1b"))
    if config.train.recompute != "none":
        rule = "does not go with recomputation: both halves of the split backward would recompute"
        problems.append(Problem("parallel.pp_schedule", rule, "set train.recompute: none, or pp_schedule: 1f1b"))
    if config.train.compile:
        rule = "does not go with train.compile: a compiled block's backward cannot be split"
        problems.append(Problem("parallel.pp_schedule", rule, "set train.compile: false, or pp_schedule: 1f1b"))
    return problems


def _micro_batches(config: Config, degrees: Degrees) -> list[Problem]:
    p, t = config.parallel, config.train
    count = t.global_batch // max(1, degrees.dp * t.micro_batch)
    batches = plural(count, "micro-batch", "micro-batches")
    given = f"global_batch({t.global_batch}) / (dp({degrees.dp}) · micro_batch({t.micro_batch})) = {batches}"
    if count and p.pp_schedule in MULTI and count % p.pp:
        rule = f"{given}: {p.pp_schedule} needs a multiple of pp({p.pp})"
        return [Problem("train.global_batch", rule, f"use a multiple of {degrees.dp * t.micro_batch * p.pp}")]
    if count and p.pp_schedule == "1f1b" and count < p.pp:
        rule = f"{given}: 1f1b needs at least pp({p.pp})"
        return [Problem("train.global_batch", rule, f"use at least {degrees.dp * t.micro_batch * p.pp}, or gpipe")]
    return []


def shards(weight: Weight, degrees: Degrees) -> int:
    """A stage holds its layers' weights whole; which layers, `stages` says."""
    return 1


def cost(shape: StepShape) -> list[Collective]:
    """The stream and its gradient, for every micro-batch; the gradients of an embedding that both ends have."""
    if shape.degrees.pp == 1:
        return []
    d, p, stage, n = shape.degrees, shape.config.parallel, shape.stage, shape.micro_batches
    size = shape.sequence_tokens / (d.cp * (d.tp if p.sp else 1)) * shape.config.model.hidden * shape.width
    sent = (1 + shape.counting) * (not stage.last) + (not stage.first)
    moves = [Collective("send", ("pp",), size, sent * n)]
    if shape.config.model.ends_share_embedding and (stage.first or stage.last):
        shared = 4 * shape.held(where=lambda w: w.looked_up)
        moves.append(Collective("all_reduce", ("pp",), shared, 1, "ends"))
    return moves
