"""Data parallelism: replicated, fully sharded (FSDP2), or hybrid; experts over their own ranks.

Every rank's loss is its tokens' sum divided by the *global* token count, so gradients are summed,
never averaged, over whatever ranks hold a copy: the dense parameters' over data and context ranks,
the experts' over the ranks left by ep and etp (edp). Context ranks hold the same weights, so they
share the sharding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

from moesys.config.schema import Config
from moesys.errors import Problem
from moesys.models.parts.axes import Weight
from moesys.parallel.cost import Collective, StepShape, buckets
from moesys.parallel.degrees import Degrees

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard
    from torch.nn import Module, Parameter

    from moesys.models.decoder import Decoder
    from moesys.parallel.mesh import ParallelMesh


def check(config: Config, degrees: Degrees) -> list[Problem]:
    """Rules of data parallelism that `config` breaks."""
    t, problems = config.train, []
    per_pass = degrees.dp * t.micro_batch
    if t.global_batch % per_pass:
        rule = (
            f"dp({degrees.dp}) · micro_batch({t.micro_batch}) = {per_pass} must divide global_batch({t.global_batch})"
        )
        lower = t.global_batch // per_pass * per_pass
        remedy = f"set global_batch to {lower or per_pass} or {lower + per_pass}" if lower else f"set it to {per_pass}"
        problems.append(Problem("train.global_batch", rule, remedy))
    if config.parallel.sync_gradients == "each" and degrees.dp_shard == 1:
        rule = "each sums the gradients of each micro-batch over the shards of dp_shard, which is 1"
        remedy = "set it to auto or once, or dp_shard to full"
        problems.append(Problem("parallel.sync_gradients", rule, remedy))
    moe, shards = config.model.moe, degrees.edp_shard
    if moe is not None and shards > 1:
        inner = moe.ffn_hidden
        if config.model.hidden % shards:
            rule = f"the experts' data ranks edp_shard({shards}) must divide model.hidden({config.model.hidden})"
            remedy = f"choose ep({degrees.ep}) or dp_shard so that edp_shard divides it (ffn_hidden is {inner})"
            problems.append(Problem("parallel.dp_shard", rule, remedy))
        if moe.lora_rank is not None and inner % shards:
            rule = f"the experts' data ranks edp_shard({shards}) must divide model.moe.ffn_hidden({inner})"
            problems.append(Problem("parallel.dp_shard", rule, f"choose ep({degrees.ep}) or dp_shard so that it does"))
    return problems


def shards(weight: Weight, degrees: Degrees) -> int:
    """Ways that FSDP splits a weight."""
    return 1 if weight.router else optimizer_shards(weight, degrees)


def optimizer_shards(weight: Weight, degrees: Degrees) -> int:
    """Ways that Megatron's distributed optimizer splits its state of a weight."""
    return degrees.edp_shard if weight.routed else degrees.dp_shard * degrees.cp if degrees.dp_shard > 1 else 1


DENSE, ROUTED = ("dp_replicate", "dp_shard", "cp"), ("edp_replicate", "edp_shard")
"""Axes of the ranks that hold the same weights for other tokens: dense ones, and those of routed experts."""


def cost(shape: StepShape) -> list[Collective]:
    """Gradients summed over replicas; parameters gathered and gradients scattered over shards."""
    if shape.config.engine == "megatron":
        return _megatron(shape)
    return _summed(shape) + [move for unit in _units(shape).values() for move in _sharded(shape, unit)]


def _megatron(shape: StepShape) -> list[Collective]:
    """Buffers of all gradients, and of all weights after the optimizer's step."""
    d, moves = shape.degrees, []
    for routed, sharded, every in ((False, d.dp_shard > 1, DENSE), (True, d.edp_shard > 1, ROUTED)):
        gradients = 4 * shape.held(routed, unsharded=True, trained=True)
        if not sharded:
            moves.append(Collective("all_reduce", every, gradients, 1))
            continue
        inner, outer = every[1:], every[:1]
        moves.append(Collective("all_gather", inner, shape.width * shape.held(routed, unsharded=True), 1))
        sums = shape.micro_batches if shape.config.parallel.sync_gradients == "each" else 1
        moves.append(Collective("reduce_scatter", inner, gradients, sums))
        moves.append(Collective("all_reduce", outer, gradients / shape.size(inner), 1))
    return moves


def _managed(weight: Weight, degrees: Degrees) -> bool:
    """Whether FSDP holds a weight: what routes is whole beside shards."""
    return not weight.router and (degrees.edp_shard if weight.routed else degrees.dp_shard) > 1


def _summed(shape: StepShape) -> list[Collective]:
    """All-reduces of what FSDP does not hold, in buckets in the order of backward (`moesys.parallel.gradients`).

    Last come weights with partial sums over tensor ranks, and routers: those of all stages of the rank together.
    """
    d, tp = shape.degrees, shape.degrees.tp

    def late(w: Weight) -> bool:
        return w.router or (tp > 1 and not w.routed and w.split_by("tp") is None and not (w.on_stream and not sp))

    sp = shape.config.parallel.sp
    order = [w for w in reversed(shape.weights()) if not late(w)]
    if shape.leads:
        order += [w for some in shape.rank_weights for w in some if late(w)]
    moves = []
    own = [w for w in order if shape.trained(w) and not _managed(w, d)]
    whole = shape.size(DENSE) == shape.size(ROUTED) == d.world  # the world is one group, however it is called
    for every in (DENSE, ROUTED):
        sizes = (4 * shape.local(w) for w in own if (ROUTED if w.routed and not whole else DENSE) == every)
        moves += [Collective("all_reduce", every, size, 1) for size in buckets(sizes)]
    return moves


def _units(shape: StepShape) -> dict[tuple[object, ...], list[Weight]]:
    """Weights that FSDP gathers together: those of a block, its experts, the embedding, the head, and the rest."""
    units: dict[tuple[object, ...], list[Weight]] = {}
    tied = shape.config.model.tie_embeddings
    for weight in shape.weights():
        if _managed(weight, shape.degrees):
            edge = (weight.looked_up or weight.makes_logits) and not tied
            place = (weight.name.rpartition(".")[0] if edge else None) if weight.layer is None else weight.layer
            units.setdefault((place, weight.routed, weight.unit), []).append(weight)
    return units


def _sharded(shape: StepShape, unit: Sequence[Weight]) -> list[Collective]:
    """Collectives of one unit of FSDP."""
    every = ROUTED if unit[0].routed else DENSE
    inner, outer = every[1:], every[:1]
    ways, moves = shape.size(inner), []
    moves.append(Collective("all_gather", inner, shape.width * _padded(shape, unit, ways), _passes(shape, unit[0])))
    gradients = 4 * _padded(shape, [w for w in unit if shape.trained(w)], ways)
    sums = shape.micro_batches if shape.config.parallel.sync_gradients == "each" else 1
    moves.append(Collective("reduce_scatter", inner, gradients, sums))
    moves.append(Collective("all_reduce", outer, gradients / ways, 1))
    return moves


def _padded(shape: StepShape, unit: Sequence[Weight], ways: int) -> float:
    """Elements of a unit on one rank when gathered: FSDP fills up the dim that it splits to a multiple of its ranks."""
    total = 0.0
    for weight in unit:
        local = list(weight.shape)
        taken = set()
        for axis in ("tp", "ep", "etp"):
            if (dim := weight.split_by(axis)) is not None and (size := getattr(shape.degrees, axis)) > 1:
                local[dim] //= size
                taken.add(dim)
        dim = _split_dim(local, taken, ways)
        local[dim] = -(-local[dim] // ways) * ways
        total += prod(local)
    return total


def _split_dim(shape: Sequence[int], taken: Collection[int], ways: int) -> int:
    """The dim of a parameter that shards split: one that no other axis splits, so that each slice is a plain one."""
    free = [dim for dim, size in enumerate(shape) if dim not in taken and size % ways == 0]
    return 0 if 0 not in taken or not free else free[0]


def summed_over_shards(shape: StepShape) -> float:
    """Bytes of gradients that a rank puts into reduce-scatters over shards in one step."""
    return sum(m.bytes * m.calls for m in cost(shape) if m.kind == "reduce_scatter")


def _passes(shape: StepShape, weight: Weight) -> int:
    """Times per step that a weight is gathered.

    Those of blocks are gathered for forward and again for backward of every micro-batch. Of the others backward needs
    some at once or throughout (the head, the last norm), which stay whole from forward to backward, and the embedding
    not at all. A pipeline keeps all weights whole from their first use in a step to their last.
    """
    counting, n = shape.counting, shape.micro_batches
    if shape.degrees.pp > 1:
        return 1 + counting
    if weight.layer is not None:
        return n * (2 + counting)
    return n * (1 + counting) if weight.looked_up and not weight.makes_logits else n + counting


def routers(model: Module) -> Iterator[Parameter]:
    """The parameters of all gates and of what mixes in shared experts. FSDP leaves them alone.

    Routing is float32 arithmetic: its weights must not be rounded on their way, as FSDP would round those of a block,
    and they are too small for collectives of their own. Every data rank holds them whole.
    """
    from moesys.moe.layer import moe_layers

    for layer in moe_layers(model).values():
        yield from layer.gate.parameters()
        yield from layer.mix.parameters()


def apply(model: Decoder, mesh: ParallelMesh, config: Config) -> Decoder:
    """Shard parameters with FSDP2 where the degrees say so; replicas are summed in `gradients`."""
    dense = mesh.data(("dp_replicate",), ("dp_shard", "cp")) if mesh.degrees.dp_shard > 1 else None
    experts = mesh.data(("edp_replicate",), ("edp_shard",))
    if dense is None:
        return model

    import torch
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

    from moesys.moe.layer import moe_layers
    from moesys.moe.lora import LoRAExperts

    dtype = getattr(torch, config.train.dtype)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Between forward and backward of a micro-batch torch's pipeline runs others, which need the same weights.
    keep = config.parallel.pp > 1
    unmanaged = set(routers(model))
    for layer in moe_layers(model).values():
        if experts is None:
            unmanaged.update(layer.experts.parameters(recurse=False))
            continue
        if isinstance(layer.experts, LoRAExperts):
            for dense_product in layer.experts.base.values():
                _shard(dense_product, dense, precision, keep=keep)
        _shard(layer.experts, experts, precision, keep=keep)
    for block in model.layers.values():
        _shard(block, dense, precision, unmanaged, keep)
    embed, head = (None, None) if config.model.tie_embeddings else (model.embed, model.head)
    if embed is not None:
        # Backward of an embedding needs the tokens, not the weights.
        _shard(embed, dense, precision, keep=keep).set_unshard_in_backward(False)
    if head is not None:
        _shard(head, dense, precision, keep=True)  # backward begins with it
    _shard(model, dense, precision, unmanaged, keep=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Between micro-batches gradients accumulate unsharded; the engine asks for the one reduction.
            module.set_requires_gradient_sync(False, recurse=False)
    _prefetch(model, [m for m in (embed, *model.layers.values(), head) if m is not None])
    return model


def _prefetch(model: Module, order: Sequence[Module]) -> None:
    """Let each module in this order, when its own weights are there, gather those of the next.

    Without this FSDP starts to gather when the host gets there: too late where a dispatcher has made it wait for
    numbers of tokens. In backward the order is the other way round, and embeddings need no weights.
    """
    from torch.distributed.fsdp import FSDPModule

    units: list[list[FSDPModule]] = [[m for m in module.modules() if isinstance(m, FSDPModule)] for module in order]
    root: list[FSDPModule] = [m for m in (model,) if isinstance(m, FSDPModule)]
    for before, after in pairwise([root, *units]):
        before[0].set_modules_to_forward_prefetch(after)
    for before, after in pairwise([root, *reversed(units)]):
        before[0].set_modules_to_backward_prefetch(after)


def _shard(module: Module, mesh, precision, ignored: set[Parameter] | None = None, keep: bool = False) -> FSDPModule:
    """`keep`: what was gathered for forward is there in backward."""
    from torch.distributed.fsdp import fully_shard

    shards = mesh.size(mesh.ndim - 1)
    return fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=not keep,
        mp_policy=precision,
        shard_placement_fn=lambda param: _placement(param, shards),
        ignored_params=ignored or None,
    )


def _placement(param: Parameter, shards: int) -> Shard:
    """The dim of a parameter that FSDP splits."""
    from torch.distributed.tensor import DTensor, Shard

    taken: set[int] = set()
    if isinstance(param, DTensor):
        taken = {p.dim for p in param.placements if isinstance(p, Shard)}
    return Shard(_split_dim(param.shape, taken, shards))
