"""Expert parallelism: the experts of a layer over ep ranks, each expert's inner size over etp ranks.

The ranks are those of data, context and tensor parallelism, folded: see `moesys.parallel.degrees`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from moesys.config.schema import Config, MoEConfig
from moesys.errors import Problem
from moesys.models.parts.axes import Weight
from moesys.parallel.cost import Collective, StepShape
from moesys.parallel.degrees import Degrees
from moesys.parallel.dispatchers import plan
from moesys.words import divisors

if TYPE_CHECKING:
    from moesys.models.decoder import Decoder
    from moesys.parallel.mesh import ParallelMesh


def check(config: Config, degrees: Degrees) -> list[Problem]:
    """Rules of expert parallelism and of dispatch that `config` breaks."""
    moe, problems = config.model.moe, []
    if moe is None:
        return [
            Problem(f"parallel.{key}", "needs MoE layers, and model.moe is absent", f"set {key}: 1 or add model.moe")
            for key in ("ep", "etp")
            if getattr(degrees, key) > 1
        ]
    problems += _gate(moe, degrees)
    if moe.experts % degrees.ep:
        rule = f"ep({degrees.ep}) must divide model.moe.experts({moe.experts})"
        problems.append(Problem("parallel.ep", rule, f"one of {divisors(moe.experts)}"))
    if moe.ffn_hidden % degrees.etp:
        rule = f"etp({degrees.etp}) must divide model.moe.ffn_hidden({moe.ffn_hidden})"
        problems.append(Problem("parallel.etp", rule, "choose a divisor"))
    if moe.bias and config.model.hidden % degrees.etp:
        rule = f"etp({degrees.etp}) must divide model.hidden({config.model.hidden}): it splits the experts' output bias"
        problems.append(Problem("parallel.etp", rule, "choose a divisor"))
    if moe.first_dense >= config.model.depth:
        rule = f"must be less than model.layers({config.model.depth}), or no layer is MoE"
        problems.append(Problem("model.moe.first_dense", rule))
    if moe.lora_rank is not None and degrees.etp > 1:
        rule = (
            f"etp({degrees.etp}) cannot split LoRA experts (lora_rank {moe.lora_rank}): half of their factors have no"
            " inner size to split, and their gradients would have to be summed over etp"
        )
        problems.append(Problem("parallel.etp", rule, "set etp: 1"))
    return problems + plan.check(config, degrees)


def _gate(moe: MoEConfig, degrees: Degrees) -> list[Problem]:
    """Dimensions that split what the gate needs whole: sequences, or all experts' weights."""
    return [
        Problem(f"parallel.{axis}", f"gate {moe.gate.kind} {reason}, which {axis}({size}) splits", f"set {axis}: 1")
        for axis, reason in moe.router.whole.items()
        if (size := getattr(degrees, axis)) > 1
    ]


def shards(weight: Weight, degrees: Degrees) -> int:
    """Ways that ep and etp split a weight."""
    return prod(getattr(degrees, axis) for axis in ("ep", "etp") if weight.split_by(axis) is not None)


def cost(shape: StepShape) -> list[Collective]:
    """Dispatch and combine of every MoE layer, forward and backward, and statistics of micro-batches and of steps."""
    return plan.cost(shape) + _micro_batches(shape) + _steps(shape)


DATA, SPREAD = ("dp_replicate", "dp_shard", "cp"), ("cp", "tp")


def _micro_batches(shape: StepShape) -> list[Collective]:
    """What the ranks that hold a part of a micro-batch tell each other, for capacity and losses."""
    t, n, moves = shape.config.train, shape.micro_batches, []
    again, full = int(t.recompute != "none"), int(t.recompute == "full")
    for placed in shape.blocks:
        for e in placed.part.exchanges(shape.config, shape.sequence_tokens, t.micro_batch):
            # Selective recomputation keeps what was gathered, and sums again.
            passes = 1 + (full if e.kind == "all_gather" else again) + (0 if e.losses else shape.counting)
            if e.over_data and shape.counting:
                continue  # the pass before the step has counted it
            moves.append(Collective(e.kind, SPREAD, e.bytes, n * passes, small=True))
            if e.over_data:
                moves.append(Collective(e.kind, DATA[:2], e.bytes, n * passes, small=True))
    return moves


def _steps(shape: StepShape) -> list[Collective]:
    """What gates are told of the global batch, after a step and before it, in one sum for all layers of a rank."""
    moe = shape.config.model.moe
    if moe is None or not shape.leads:
        return []
    layers = sum(shape.config.model.is_moe(layer) for stage in shape.stages for layer in stage.layers)
    sums = [moe.router.step_statistics] + [moe.router.first_statistics] * shape.counting
    return [
        Collective("all_reduce", axes, 8.0 * layers * numbers, 1, small=True)
        for numbers in sums
        for axes in (DATA, ("tp",))
    ]


def apply(model: Decoder, mesh: ParallelMesh, config: Config) -> Decoder:
    """Shard the experts of every MoE layer and give it the dispatcher of the configuration."""
    import torch
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from moesys.moe.layer import moe_layers
    from moesys.parallel.dispatchers.build import builder
    from moesys.parallel.scope import SplitMicroBatch, WholeMicroBatch

    spread, make = mesh.group("cp", "tp"), builder(config, mesh)
    data = mesh.group("dp_replicate", "dp_shard")
    experts_mesh, active = mesh.mesh("ep", "etp"), mesh.active("ep", "etp")
    for name, layer in moe_layers(model).items():
        layer.scope = WholeMicroBatch(data)
        if spread is not None:
            assert model.positions is not None
            layer.scope = SplitMicroBatch(data, spread, model.positions, mesh.degrees.tp, mesh.place["tp"])
        if make is None or experts_mesh is None:
            continue
        layer.dispatcher = dispatcher = make(layer.gate.experts)
        dispatcher.layer = name.rpartition(".")[0]
        for key, weight in list(layer.experts.named_parameters(recurse=False)):
            dims = [model.described[f"{name}.experts.{key}"].split_by(axis) for axis in active]
            placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
            setattr(layer.experts, key, torch.nn.Parameter(distribute_tensor(weight.data, experts_mesh, placements)))
        share = config.model.hidden // mesh.degrees.etp
        layer.experts.fc2_bias_start = mesh.expert_place["etp"] * share
    return model
