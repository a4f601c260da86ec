"""Expert parallelism for a user's own torch model and training loop.

The model is any `nn.Module` with MoE layers of this project in it. Its experts are split over ranks; its other layers
stay as they are, for DDP, FSDP2 or the loop itself to replicate.

Gradients. Every rank computes the loss of its own tokens, and tokens are sent to the ranks of their experts. So
after backward an expert has the *sum* of the gradients of all tokens that its expert group sent to it. These sums are
added up over the ranks that hold copies of the expert, and divided by what the dense layers' gradients are divided by:
all data × expert ranks, because DDP and FSDP2 average dense gradients over all of them; or by nothing, where the loop
sums dense gradients. Dividing by the number of copies alone, as DDP would, gives experts too large a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from moesys.errors import MoesysError
from moesys.moe.experts import Experts, local
from moesys.moe.gates.smear import SmearGate
from moesys.moe.layer import MoELayer, moe_layers
from moesys.moe.routing import MicroBatch
from moesys.parallel import comm
from moesys.parallel.dispatchers.build import dispatchers

AXES = ("data", "expert")
"""Names of the axes of a mesh that is made of plain process groups."""

Model = TypeVar("Model", bound=nn.Module)


class DataMicroBatch(MicroBatch):
    """A micro-batch on one rank, while the other ranks of `groups`, one after another, run others."""

    def __init__(self, groups: Sequence[dist.ProcessGroup]):
        self.groups = [group for group in groups if group.size() > 1]

    def sum_global(self, x: Tensor) -> Tensor:
        """The sum of `x`, a tensor of any shape, over the ranks of all groups; not differentiable."""
        for group in self.groups:
            x = comm.all_reduce(x, group)
        return x


def expert_parallel(
    model: Model,
    mesh: DeviceMesh | dist.ProcessGroup,
    data: dist.ProcessGroup | None = None,
    *,
    dispatcher: str = "all_to_all",
    chunks: int = 1,
    overlap_shared: bool = True,
    payload: Literal["model", "fp8"] = "model",
    gradients: Literal["mean", "sum"] = "mean",
    **fsdp: Any,
) -> Model:
    """Split the experts of every MoE layer of `model` over ranks, in place; returns the model.

    Call it on all ranks, before the model is given to DDP or `fully_shard` and before the optimizer is made:

        mesh = init_device_mesh("cuda", (world // 8, 8), mesh_dim_names=("data", "expert"))
        moesys.expert_parallel(model, mesh)
        for block in model.blocks:
            fully_shard(block)        # experts are left to expert_parallel
        fully_shard(model)

    With DDP, give `DistributedDataParallel` this very `model`: `expert_parallel` makes it ignore the experts. A plain
    loop reduces the gradients of all parameters but the experts', which are complete after backward.

    Each rank keeps E / ep of a layer's E experts, as DTensors [E, …] that are sharded over the expert axis, and,
    where several ranks have the same experts, by FSDP2 over the data axis. Weights start as those of the first rank;
    on the meta device they stay there, and each module's `reset_parameters` fills them after `to_empty`.

    Args:
        model: holds one `MoELayer` or more, with `Experts` that are not split yet.
        mesh: a DeviceMesh with two named axes: ranks along the first hold the same experts and different data, ranks
            along the second share the experts of a layer. Or a process group that shares the experts of a layer.
        data: beside a process group, the group of the ranks at this rank's place in their expert groups, which hold
            the same experts. None: the expert group is the whole world.
        dispatcher: how tokens get to their experts: "all_to_all", "all_gather", "hierarchical", or a plug-in's kind.
        chunks: pieces of the token stream; one is on its way while another is computed.
        overlap_shared: compute shared experts while tokens are on their way.
        payload: "fp8" sends tokens to experts in eight bits, with scales.
        gradients: what the loop makes of dense gradients over all data × expert ranks. "mean": their mean, as DDP
            and FSDP2 do, of losses that are means over a rank's tokens. "sum": their sum, of losses that are divided
            by the number of tokens of all ranks.
        fsdp: options of `fully_shard` for the experts, as `mp_policy` and `reshard_after_forward`.

    Auxiliary losses of gates enter backward by themselves, as if they were added to this rank's loss. Where the
    loss is divided by a number n of accumulated micro-batches, set `layer.loss_scale /= n` of every MoE layer too.

    Raises:
        MoesysError: no MoE layer; experts that cannot be split, or are split already; groups that do not fit.
        ConfigError: a dispatcher that does not exist, or one of its options that is illegal.
    """
    layers = moe_layers(model)
    if gradients not in ("mean", "sum"):
        raise MoesysError(
            f"gradients={gradients!r} is neither 'mean' nor 'sum'\n    remedy: as your loop makes dense ones"
        )
    if not layers:
        remedy = "build the model's MoE layers with moesys.MoELayer"
        raise MoesysError(f"{type(model).__name__} holds no moesys.MoELayer\n    remedy: {remedy}")
    grid = _grid(mesh, data, next(iter(layers.values())))
    data_group, expert_group = grid.get_group(0), grid.get_group(1)
    for name, layer in layers.items():
        _check(name, layer, expert_group.size())
    scope = DataMicroBatch((expert_group, data_group))
    dispatch: dict[str, Any] = {"chunks": chunks, "overlap_shared": overlap_shared, "payload": payload}
    make = dispatchers(expert_group, _device(grid), kind=dispatcher, **dispatch)
    share = 1.0 / grid.size()
    for name, layer in layers.items():
        if expert_group.size() > 1:
            layer.dispatcher = make(layer.gate.experts)
            layer.dispatcher.layer = name
        layer.scope, layer.apart = scope, True
        if gradients == "mean":
            layer.experts.gradient_scale = share
        else:
            layer.loss_scale *= share
        _shard(layer.experts, grid, fsdp)
    _leave_out_of_ddp(model, layers)
    return model


def update_gates(model: nn.Module) -> None:
    """Let gates that follow the load of their experts (`TopKGate(bias_rate=…)`) see an optimizer step.

    Call it on all ranks after `optimizer.step()`. The load is that of all ranks that `expert_parallel` was given.
    """
    found = [
        (layer, counts) for layer in moe_layers(model).values() if (counts := layer.gate.step_statistics()) is not None
    ]
    if not found:
        return
    total = found[0][0].scope.sum_global(torch.cat([counts.double() for _, counts in found]))
    for (layer, _), part in zip(found, total.split([counts.numel() for _, counts in found]), strict=True):
        layer.gate.after_step(part)


def _check(name: str, layer: MoELayer, ep: int) -> None:
    """Whether the experts of a layer can be split `ep` ways.

    Raises:
        MoesysError: they cannot.
    """
    experts = layer.gate.experts
    if not isinstance(layer.experts, Experts):
        rule, remedy = f"has {type(layer.experts).__name__}, which share weights", "use moesys.Experts"
    elif layer.dispatcher.communicates or hasattr(layer.experts.fc1, "device_mesh"):
        rule, remedy = "has experts that are split already", "call expert_parallel once, before fully_shard"
    elif isinstance(layer.gate, SmearGate) and ep > 1:
        rule, remedy = "has a SmearGate, which mixes the weights of all experts", "use another gate"
    elif experts % ep:
        rule, remedy = f"has {experts} experts, which {ep} ranks cannot share evenly", "use a group of another size"
    else:
        return
    raise MoesysError(f"the MoE layer {name or 'itself'} {rule}\n    remedy: {remedy}")


def _grid(mesh: DeviceMesh | dist.ProcessGroup, data: dist.ProcessGroup | None, layer: MoELayer) -> DeviceMesh:
    """The mesh data × expert.

    Raises:
        MoesysError: what was given makes none.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim == 2 and mesh.mesh_dim_names is not None and data is None:
            return mesh
        if mesh.ndim != 1:
            rule = f"a mesh of {mesh.ndim} axes{'' if mesh.mesh_dim_names else ' without names'}"
            remedy = "give two named axes: init_device_mesh(device, (data, expert), mesh_dim_names=('data', 'expert'))"
            raise MoesysError(f"expert_parallel cannot use {rule}\n    remedy: {remedy}")
        device, group = mesh.device_type, mesh.get_group()
    else:
        device, group = layer.experts.get_parameter("fc1").device.type, mesh
    if device == "meta":
        device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    if data is None:
        if group.size() != dist.get_world_size():
            rule = f"an expert group of {group.size()} ranks in a world of {dist.get_world_size()}"
            remedy = "give data=… the group of the ranks that hold the same experts, or a mesh of data × expert"
            raise MoesysError(f"{rule} leaves open which ranks hold copies of the experts\n    remedy: {remedy}")
        data = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        assert data is not None
    rows: list[Any] = [None] * data.size()
    dist.all_gather_object(rows, dist.get_process_group_ranks(group), group=data)
    column = [row[group.rank()] if len(row) == group.size() else None for row in rows]
    if column != dist.get_process_group_ranks(data):
        given = dist.get_process_group_ranks(data)
        rule = f"the data group has ranks {given}, and those at this rank's place in their expert groups are {column}"
        raise MoesysError(f"{rule}\n    remedy: give the ranks that hold the same experts as this one")
    return DeviceMesh.from_group([data, group], device, torch.tensor(rows), mesh_dim_names=AXES)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def _shard(experts: nn.Module, grid: DeviceMesh, options: dict[str, Any]) -> None:
    """Split the weights over the expert axis, and shard what is left over the data axis."""
    assert grid.mesh_dim_names is not None
    data, expert = (grid[name] for name in grid.mesh_dim_names)
    for key, weight in list(experts.named_parameters(recurse=False)):
        whole = weight.detach()
        part = distribute_tensor(whole, expert, [Shard(0)]) if expert.size() > 1 else whole
        if not part.is_meta and data.size() > 1:
            dist.broadcast(local(part), group_src=0, group=data.get_group())
        setattr(experts, key, nn.Parameter(part, requires_grad=weight.requires_grad))
    if isinstance(policy := options.get("mp_policy"), MixedPrecisionPolicy):
        # Rows come in the type of the model's stream; weights of routing must stay float32.
        options = {**options, "mp_policy": replace(policy, cast_forward_inputs=False)}
    shards = data.size()
    sharded = fully_shard(experts, mesh=data, shard_placement_fn=lambda p: _placement(p, shards), **options)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _placement(parameter: nn.Parameter, shards: int) -> Shard:
    """The first dim behind that of the experts that `shards` divides; that of the experts if there is none."""
    return Shard(next((dim for dim in range(1, parameter.ndim) if parameter.shape[dim] % shards == 0), 0))


def _leave_out_of_ddp(model: nn.Module, layers: dict[str, MoELayer]) -> None:
    """Tell `DistributedDataParallel(model)` that experts are not its own.

    DDP has no public way to leave parameters out; it reads this attribute, as DeepSpeed and Tutel use it.
    """
    prefixes = tuple(f"{name}.experts." if name else "experts." for name in layers)
    names = [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    before = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = before + names  # type: ignore[assignment]
