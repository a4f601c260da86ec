"""Data parallelism: replicated, fully sharded (FSDP2), or hybrid; experts over their own ranks.

Every rank's loss is its tokens' sum divided by the *global* token count, so gradients are summed,
never averaged, over whatever ranks hold a copy: the dense parameters' over data and context ranks,
the experts' over the ranks left by ep and etp (edp). Context ranks hold the same weights, so they
share the sharding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesys.config.schema import Config
from moesys.errors import Problem
from moesys.models.size import Weight
from moesys.parallel.cost import Collective, StepShape
from moesys.parallel.degrees import Degrees

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard
    from torch.nn import Module, Parameter

    from moesys.models.decoder import Decoder
    from moesys.parallel.mesh import ParallelMesh


def check(config: Config, degrees: Degrees) -> list[Problem]:
    t, problems = config.train, []
    per_pass = degrees.dp * t.micro_batch
    if t.global_batch % per_pass:
        rule = (
            f"dp({degrees.dp}) · micro_batch({t.micro_batch}) = {per_pass} must divide global_batch({t.global_batch})"
        )
        lower = t.global_batch // per_pass * per_pass
        remedy = f"set global_batch to {lower or per_pass} or {lower + per_pass}" if lower else f"set it to {per_pass}"
        problems.append(Problem("train.global_batch", rule, remedy))
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
    return degrees.edp_shard if weight.routed else degrees.dp_shard * degrees.cp if degrees.dp_shard > 1 else 1


def cost(shape: StepShape) -> list[Collective]:
    """Gradients summed over replicas; parameters gathered and gradients scattered over shards."""
    d, moves = shape.degrees, []
    spans = (
        (False, d.dp_shard > 1, ("dp_replicate", "dp_shard", "cp"), ("dp_shard", "cp"), ("dp_replicate",)),
        (True, d.edp_shard > 1, ("edp_replicate", "edp_shard"), ("edp_shard",), ("edp_replicate",)),
    )
    for routed, sharded, every, inner, outer in spans:
        size = shape.held(routed=routed, unsharded=True)
        gradients = 4 * shape.held(routed=routed, unsharded=True, trained=True)
        if not sharded:
            moves.append(Collective("all_reduce", every, gradients, 1))
            continue
        # Alone, forward and backward gather for every micro-batch; torch's pipeline keeps weights between backwards.
        passes = 2 * shape.micro_batches if shape.config.parallel.pp == 1 else shape.micro_batches + 1
        if shape.config.engine == "megatron":
            passes = 1  # its optimizer gives what it updated to all
        moves.append(Collective("all_gather", inner, shape.width * size, passes))
        moves.append(Collective("reduce_scatter", inner, gradients, 1))
        moves.append(Collective("all_reduce", outer, gradients / shape.size(inner), 1))
    return moves


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

    precision, exact = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for dtype in (getattr(torch, config.train.dtype), None)
    )
    unmanaged: set[Parameter] = set()
    for layer in moe_layers(model).values():
        for router in (layer.gate, layer.mix):
            if config.train.dtype != "float32" and any(True for _ in router.parameters()):
                # Routing is float32 arithmetic: its weights must not be rounded on the way.
                _shard(router, dense, exact)
        if isinstance(layer.experts, LoRAExperts):
            for dense_product in layer.experts.base.values():
                _shard(dense_product, dense, precision)
        if experts is None:
            unmanaged.update(layer.experts.parameters(recurse=False))
        else:
            _shard(layer.experts, experts, precision)
    edges = [] if config.model.tie_embeddings else [model.embed, model.head]
    for module in [*model.layers.values(), *(m for m in edges if m is not None), model]:
        _shard(module, dense, precision, unmanaged)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Between micro-batches gradients accumulate unsharded; the engine asks for the one reduction.
            module.set_requires_gradient_sync(False, recurse=False)
    return model


def _shard(module: Module, mesh, precision, ignored: set[Parameter] | None = None) -> None:
    from torch.distributed.fsdp import fully_shard

    shards = mesh.size(mesh.ndim - 1)
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=precision,
        shard_placement_fn=lambda param: _placement(param, shards),
        ignored_params=ignored or None,
    )


def _placement(param: Parameter, shards: int) -> Shard | None:
    """A dim that no other axis splits, so that every axis' slice of a parameter is a plain one."""
    from torch.distributed.tensor import DTensor, Shard

    taken = set()
    if isinstance(param, DTensor):
        taken = {p.dim for p in param.placements if isinstance(p, Shard)}
    if 0 not in taken:
        return Shard(0)
    free = [dim for dim in range(param.ndim) if dim not in taken and param.shape[dim] % shards == 0]
    return Shard(free[0]) if free else Shard(0)
