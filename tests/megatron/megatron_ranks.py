"""What a rank of the Megatron tests on several processes does; importable by name."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_sides import (
    EXPERTS,
    HIDDEN,
    INNER,
    compare_gradients,
    copy_weights,
    gpt_model,
    losses,
    megatron,
    moe_pairs,
    run,
    transformer_config,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from moesys.megatron.arguments import Options
from moesys.megatron.layer import MoESysLayer
from moesys.megatron.weights import Place, part

SIZES = {
    "tp 2, ep 2, etp 2": (2, 2, 2),
    "ep 2": (1, 2, 1),
    "ep 4": (1, 4, 1),
    "tp 2, ep 2": (2, 2, 1),
    "tp 2, ep 4": (2, 4, 1),
    "ep 2, etp 2": (1, 2, 2),
    "tp 2": (2, 1, 2),
    "tp 2, etp 1": (2, 1, 1),
}
"""tp, ep and etp of four ranks."""

ALONE = ("tp 2, etp 1",)
"""Megatron-Core 0.16.1 reduces gradients of experts that are whole on every tensor rank as those of dense layers."""

WITH_SHARED = {"moe_shared_expert_intermediate_size": 12, "moe_shared_expert_gate": True}

LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
    "moe_z_loss_coeff": 0.05,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {**LOSSES, **WITH_SHARED},
    "sigmoid": {
        **LOSSES, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2,
    },
    "capacity": {"moe_expert_capacity_factor": 0.75},
    "per token": {
        "calculate_per_token_loss": True, "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2], "moe_z_loss_coeff": 0.05,
    },
}  # fmt: skip


def sizes(name: str) -> dict[str, int]:
    tp, ep, etp = SIZES[name]
    return {
        "tensor_model_parallel_size": tp, "expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp,
    }  # fmt: skip


def config_of(name: str, **options: Any) -> Any:
    # Gloo has no uneven all-gather, which Megatron's all-to-all needs where experts are split.
    theirs = "allgather" if SIZES[name][2] > 1 else "alltoall"
    parallel = {**sizes(name), "sequence_parallel": SIZES[name][0] > 1, "moe_token_dispatcher_type": theirs}
    return transformer_config(**{**parallel, **options})


def agree(name: str, options: dict[str, Any]) -> None:
    """The plug-in's model is that of Megatron's own layer, on every rank."""
    config = config_of(name, num_layers=1, **options)
    mine, theirs = gpt_model(config, True, Options(dispatch="all_to_all")), gpt_model(config, False)
    copy_weights(mine, theirs)
    seed = dist.get_rank() // SIZES[name][0]
    losses()
    expected, told = run(theirs, seed), metrics()
    torch.testing.assert_close(run(mine, seed), expected, rtol=1e-5, atol=1e-5)
    found = metrics()
    assert set(found) == set(told)
    for key, (values, whole) in told.items():
        torch.testing.assert_close(found[key][0], values, rtol=1e-5, atol=1e-5)
        if key == "z_loss":  # of which Megatron 0.16 reports one rank's
            dist.all_reduce(values)
            whole = values / dist.get_world_size()
        torch.testing.assert_close(found[key][1], whole, rtol=1e-5, atol=1e-5)
    compare_gradients(mine, theirs)


def metrics() -> dict[str, tuple[Tensor, Tensor]]:
    """Losses by layer since the last call: this rank's, and what Megatron's logger makes of all ranks'."""
    from megatron.core.transformer.moe.moe_utils import reduce_aux_losses_tracker_across_ranks

    mine = losses(keep=True)
    reduce_aux_losses_tracker_across_ranks()
    whole = losses()
    return {name: (values, whole[name]) for name, values in mine.items()}


def alike(name: str) -> None:
    """In bfloat16 the same tokens give the same bits on every rank, however they travel."""
    config = config_of(name, num_layers=1, params_dtype=torch.bfloat16, bf16=True)
    for kind in ("all_to_all", "all_gather", "hierarchical"):
        layer = MoESysLayer(config, options=Options(dispatch=kind))
        x = torch.randn(16, 2, HIDDEN, generator=torch.Generator().manual_seed(5)).bfloat16()
        out = layer(x)[0].detach()
        first = out.clone()
        dist.broadcast(first, 0)
        assert torch.equal(out, first), f"{kind}: {(out - first).abs().max()}"


def reduced(name: str) -> tuple[Place, dict[str, Tensor], dict[str, Tensor]]:
    """This rank's place and, after Megatron's reduction over a batch of four parts, its MoE layer's gradients and
    one of the dense layers' that every rank has."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    tp, ep, etp = SIZES[name]
    config = config_of(name, num_layers=1, moe_router_topk=3, **WITH_SHARED)
    model = gpt_model(config, plug_in=True, options=Options(dispatch="all_to_all"))
    ((layer, _),) = moe_pairs(model, model, same=True)
    place = place_of(layer, tp, ep, etp)
    layer.moe.load_state_dict(part(drawn(), place))
    parallel = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    parts = 4 * tp // dist.get_world_size()
    first = dist.get_rank() // tp * parts
    for seed in range(first, first + parts):
        run(parallel, seed, share=1 / parts)
    finalize_model_grads([parallel])
    moe = {n: p.main_grad.clone() for n, p in layer.moe.named_parameters()}
    return place, moe, {"position": model.embedding.position_embeddings.weight.main_grad.clone()}


def place_of(layer: Any, tp: int, ep: int, etp: int) -> Place:
    groups = layer.groups
    return Place(groups.ep.rank(), ep, groups.expt_tp.rank(), etp, groups.tp.rank(), tp)


def drawn() -> dict[str, Tensor]:
    """A whole MoE layer's weights."""
    g = torch.Generator().manual_seed(1)
    shapes = {
        "gate.projection.weight": (EXPERTS, HIDDEN), "mix.projection.weight": (1, HIDDEN),
        "experts.fc1": (EXPERTS, HIDDEN, 2, INNER), "experts.fc2": (EXPERTS, INNER, HIDDEN),
        "shared.gate_proj.weight": (12, HIDDEN), "shared.up_proj.weight": (12, HIDDEN),
        "shared.down_proj.weight": (HIDDEN, 12),
    }  # fmt: skip
    return {name: torch.randn(*shape, generator=g) / 3 for name, shape in shapes.items()}


JOURNEYS = (
    ("tp 2, ep 2, etp 2", True, "ep 4", True),
    ("ep 4", True, "tp 2, ep 2", True),
    ("ep 2", False, "tp 2, ep 4", True),
    ("tp 2, ep 2, etp 2", True, "ep 2", False),
)
"""A checkpoint's (sizes, whether of the plug-in) when it is saved, and when it is loaded; in the order of
`SIZES`."""


def checkpointed(name: str, plug_in: bool) -> tuple[nn.Module, dict[str, Any]]:
    model = gpt_model(config_of(name, **OPTIONS["sigmoid"], **WITH_SHARED), plug_in)
    return model, model.sharded_state_dict(metadata={"singleton_local_shards": False})


def save(folder: Path, name: str, plug_in: bool) -> Tensor:
    """Write a checkpoint; what its model computes."""
    from megatron.core import dist_checkpointing

    folder = folder / f"{name} {plug_in}"
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    model, state = checkpointed(name, plug_in)
    disturb(model)
    dist_checkpointing.save(state, str(folder))
    return run(model, seed=5)


def load(folder: Path, expected: Tensor, saved: str, saver: bool, loaded: str, loader: bool) -> None:
    """What was saved in one layout computes the same in another."""
    from megatron.core import dist_checkpointing

    model, state = checkpointed(loaded, loader)
    # Megatron's own experts ask for extra states, which are empty without Transformer Engine.
    strict = "assume_ok_unexpected" if loader else "log_all"
    found = dist_checkpointing.load(state, str(folder / f"{saved} {saver}"), strict=strict)
    left = model.load_state_dict(found[0] if isinstance(found, tuple) else found, strict=False)
    assert all(name.endswith("_extra_state") for name in left.missing_keys), left
    torch.testing.assert_close(run(model, seed=5), expected, rtol=1e-5, atol=1e-5)


def disturb(model: nn.Module) -> None:
    """Give the selection biases values, and make sure that the model is not what another one starts as."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("selection_bias", "expert_bias")):
                buffer.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
        for weight in model.parameters():
            weight.mul_(1.1)


def everything(rank: int, folder: Path) -> dict[str, Any]:
    """All cases in one set of processes: what went wrong by case, and the reduced gradients by sizes."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # Megatron-Core's own
    found: dict[str, Any] = {}
    kept: dict[tuple[str, bool], Tensor] = {}
    for name in SIZES:
        with megatron(**sizes(name)):
            if name not in ALONE:
                for kind, options in OPTIONS.items():
                    found[f"{name}, {kind}"] = attempt(partial(agree, name, options))
                found[f"alike {name}"] = attempt(partial(alike, name))
            found[f"reduced {name}"] = reduced(name)
            for journey in JOURNEYS:
                if journey[0] == name and journey[:2] not in kept:
                    kept[journey[:2]] = save(folder, *journey[:2])
                if journey[2] == name:
                    found[f"reshard {journey}"] = attempt(partial(load, folder, kept[journey[:2]], *journey))
    return found


def attempt(case: Callable[[], None]) -> str:
    try:
        case()
    except (Exception, CheckpointException):
        return traceback.format_exc()
    return ""
