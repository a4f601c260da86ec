"""Builds the plug-in on a rank, with the sizes, attributes and initial values of Megatron-Core's own layer."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.schema import DispatchConfig, MoEConfig
from moesys.errors import Problem
from moesys.megatron import settings
from moesys.megatron.experts import MegatronExperts
from moesys.megatron.objective import MegatronMoE
from moesys.megatron.refusal import Refusal
from moesys.megatron.router import DoubleProjection, MegatronExpertGroups, MegatronGate
from moesys.megatron.scope import MegatronScope, ProcessGroups
from moesys.megatron.shared import SharedExperts
from moesys.models.moe import build_gate
from moesys.moe.experts import Experts
from moesys.moe.gates import Gate
from moesys.moe.gates.projection import GateProjection
from moesys.moe.layer import MoELayer
from moesys.moe.shared import build_mix
from moesys.parallel.dispatchers.base import ExpertParallelDispatcher
from moesys.parallel.dispatchers.kind import describe
from moesys.parallel.dispatchers.ranks import ExpertRanks


def build(m: MoEConfig, config: Any, groups: ProcessGroups, dispatch: DispatchConfig) -> MegatronMoE:
    """The layer on this rank, with initial values; collective over `groups.tp_ep` if dispatch is hierarchical.

    Raises:
        Refusal: sizes that the groups do not divide.
    """
    _check(m, groups)
    device = torch.device("cpu" if config.use_cpu_initialization else f"cuda:{torch.cuda.current_device()}")
    # torch draws initial values, which are thrown away; their number would depend on the layout.
    with device, torch.random.fork_rng([] if device.type == "cpu" else [device]):
        layer = _parts(m, config, groups)
    layer.to(dtype=config.params_dtype)
    layer.scope = MegatronScope(groups)
    layer.layers = config.num_layers + (config.mtp_num_layers or 0)
    layer.per_token = config.calculate_per_token_loss
    layer.config, layer.coefficients = config, settings.by_name(settings.balance(config))
    if groups.tp_ep.size() > 1:
        layer.dispatcher = _dispatcher(m.experts, groups, dispatch, device)
    mark(layer, config, groups)
    if config.perform_initialization:
        _initialise(layer, config, groups)
    return layer


def _check(m: MoEConfig, groups: ProcessGroups) -> None:
    sizes = (
        ("num_moe_experts", m.experts, "expert_model_parallel_size", groups.ep.size()),
        ("moe_ffn_hidden_size", m.ffn_hidden, "expert_tensor_parallel_size", groups.expt_tp.size()),
        ("moe_shared_expert_intermediate_size", m.shared_width, "tensor_model_parallel_size", groups.tp.size()),
    )
    problems = [
        Problem(by, f"{by}({ways}) must divide {what}({size})", "choose a divisor")
        for what, size, by, ways in sizes
        if size % ways
    ]
    if m.bias and groups.expt_tp.size() > 1:
        rule = "experts with biases are not split along their inner size"
        problems.append(Problem("expert_tensor_parallel_size", rule, "1, or add_bias_linear=False"))
    if problems:
        raise Refusal(problems)


def _parts(m: MoEConfig, config: Any, groups: ProcessGroups) -> MegatronMoE:
    hidden, own = config.hidden_size, m.ffn_hidden // groups.expt_tp.size()
    experts = MegatronExperts(m.experts // groups.ep.size(), hidden, own, m.activation, m.bias)
    shared = None
    if m.shared_experts:
        shared = SharedExperts(hidden, m.shared_width, m.activation, groups.tp, config.sequence_parallel)
    mix = build_mix(m.shared_mix, hidden) if m.shared_experts else None
    return MegatronMoE(build_megatron_gate(m, config), experts, shared, mix=mix)


def build_megatron_gate(m: MoEConfig, config: Any) -> Gate:
    """Token choice by Megatron's definitions, or one of the project's other gates."""
    g, hidden = m.gate, config.hidden_size
    if g.kind != "top_k":
        return build_gate(m, hidden, 0)
    groups = MegatronExpertGroups(g.groups, g.groups_kept, best=m.top_k // g.groups_kept) if g.groups > 1 else None
    projection = DoubleProjection if config.moe_router_dtype == "fp64" else GateProjection
    return MegatronGate(
        hidden,
        m.experts,
        m.top_k,
        jitter=g.jitter,
        biased=config.moe_router_enable_expert_bias,
        global_balance="global_aux_loss" in settings.coefficients(config),
        score=g.score,
        normalize=m.normalize,
        scale=m.scale,
        groups=groups,
        capacity=settings.capacity(config),
        balance=settings.balance(config),
        projection=projection(hidden, m.experts, g.bias),
    )


def _dispatcher(
    experts: int, groups: ProcessGroups, d: DispatchConfig, device: torch.device
) -> ExpertParallelDispatcher:
    ep, etp, timeout = groups.ep.size(), groups.expt_tp.size(), timedelta(minutes=10)
    ranks = ExpertRanks(groups.tp_ep, ep, etp, device, timeout, socket.gethostname(), wide=True)
    return describe(d).build(ranks)(experts)


SPLIT = {"fc1": 3, "linear_fc1.bias": 2, "fc2": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1}
"""The dim that tensor parallelism splits."""


def mark(layer: MoELayer, config: Any, groups: ProcessGroups) -> None:
    """Set the attributes that tell Megatron's gradient reduction, clipping and optimizer how parameters are split."""
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes as split

    everywhere = groups.ep.size() == 1 and groups.expt_tp.size() == groups.tp.size()
    for name, weight in layer.experts.named_parameters():
        # These are reduced over the ranks with the same experts, not over the data-parallel ranks of dense layers.
        weight.allreduce = everywhere  # type: ignore[attr-defined]
        split(weight, True, SPLIT.get(name, 0), 1)
    if layer.shared is not None:
        for name, weight in layer.shared.named_parameters():
            split(weight, True, SPLIT[name.split(".")[0]], 1)
    for part in (layer.gate, layer.mix, layer.zero):
        for weight in () if part is None else part.parameters():
            # Each tensor rank sees its own tokens: Megatron adds their gradients up.
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@torch.no_grad()
def _initialise(layer: MegatronMoE, config: Any, groups: ProcessGroups) -> None:
    for part in (layer.gate, layer.mix):
        for weight in part.parameters():
            config.init_method(weight)
    experts, shared, start = layer.experts, layer.shared, config.init_method
    assert isinstance(experts, Experts)
    local, end = len(experts.fc1), config.output_layer_init_method
    fill = _filler(config, groups.ep.rank() * local, groups.ep.size() * local, groups.expt_tp, expert=True)
    # Megatron's methods are for [out, in].
    fill(start, [fc1.permute(1, 2, 0) for fc1 in experts.fc1], 1)
    fill(end, [fc2.t() for fc2 in experts.fc2], 1)
    for bias in experts.biases():
        if bias is not None:
            bias.zero_()
    if shared is not None:
        fill = _filler(config, 0, 1, groups.tp, expert=False)
        for name, weight in shared.named_parameters():
            down = name.startswith("down")
            fill(end if down else start, [weight], 1 if down else 0)


Fill = Callable[[Callable[[Tensor], Any], list[Tensor], int], None]


def _filler(config: Any, first: int, count: int, group: dist.ProcessGroup, expert: bool) -> Fill:
    """A function that fills weights of experts; on CPU by slices of the whole, so that no layout changes them."""

    def slices(method: Callable[[Tensor], Any], weights: list[Tensor], dim: int) -> None:
        # The method sees fc1 [G, F, H] as [G · F, H].
        shape = list(weights[0].shape)
        split = dim if len(shape) == 2 else 1
        shape[split] *= group.size()
        for number in range(count):
            whole = torch.empty(shape).flatten(0, -2)
            method(whole)
            if first <= number < first + len(weights):
                part = whole.view(shape).chunk(group.size(), split)[group.rank()]
                weights[number - first].copy_(part)

    def own(method: Callable[[Tensor], Any], weights: list[Tensor], dim: int) -> None:
        with _tracked(expert):
            for weight in weights:
                part = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
                method(part.flatten(0, -2))
                weight.copy_(part)

    return slices if config.use_cpu_initialization else own


def _tracked(expert: bool) -> AbstractContextManager[Any]:
    """A context of Megatron's random numbers, which differ between tensor ranks and, for experts, expert ranks."""
    from megatron.core.tensor_parallel import random

    tracker = random.get_cuda_rng_tracker()
    if not tracker.is_initialized():
        return nullcontext()
    return tracker.fork(random.get_expert_parallel_rng_tracker_name()) if expert else tracker.fork()
