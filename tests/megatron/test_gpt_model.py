"""Outputs, losses and gradients of a GPT model with the plug-in and with Megatron-Core's own layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron_sides import (
    batch,
    compare_gradients,
    copy_weights,
    gpt_model,
    losses,
    megatron,
    moe_pairs,
    run,
    transformer_config,
)
from torch import nn

# Megatron-Core's own.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}:megatron.*") for kind in ("DeprecationWarning", "UserWarning")
]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("world")
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
    with megatron():
        yield
    dist.destroy_process_group()


def both(**options: Any) -> tuple[nn.Module, nn.Module]:
    config = transformer_config(**options)
    mine, theirs = gpt_model(config, plug_in=True), gpt_model(config, plug_in=False)
    if config.moe_router_enable_expert_bias:
        for _, other in moe_pairs(mine, theirs):
            other.router.expert_bias.normal_(std=0.3)
    copy_weights(mine, theirs)
    return mine, theirs


def agree(mine: nn.Module, theirs: nn.Module, **more: Any) -> dict[str, torch.Tensor]:
    """Assert that both compute the same; the losses, which are told in Megatron's metrics."""
    losses()
    expected, told = run(theirs, **more), losses()
    torch.testing.assert_close(run(mine, **more), expected, rtol=1e-5, atol=1e-5)
    found = losses()
    assert set(found) == set(told)
    for name, values in told.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5)
    compare_gradients(mine, theirs)
    return found


SIGMOID = {"moe_router_score_function": "sigmoid"}
BIASED = {**SIGMOID, "moe_router_enable_expert_bias": True}
PRE = {"moe_router_pre_softmax": True}
LIMITED = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
    "moe_z_loss_coeff": 0.05,
}
CASES = {
    "softmax top-1": {**PRE, "moe_router_topk": 1},
    "softmax top-2": {},
    "softmax top-8": {"moe_router_topk": 8},
    "softmax before": {**PRE, "moe_router_topk_scaling_factor": 2.5},
    "sigmoid top-1": {**SIGMOID, "moe_router_topk": 1},
    "sigmoid top-2": {**SIGMOID, "moe_router_topk_scaling_factor": 1.5},
    "sigmoid top-8": {**SIGMOID, "moe_router_topk": 8},
    "groups by the best": {**PRE, **LIMITED},
    "groups by the best two": {**BIASED, **LIMITED, "moe_router_topk": 4},
    "groups by logits": {**LIMITED, "moe_router_topk": 4},
    "capacity": {"moe_expert_capacity_factor": 0.75},
    "capacity, padded": {"moe_expert_capacity_factor": 0.75, "moe_pad_expert_input_to_capacity": True},
    "shared": {"moe_shared_expert_intermediate_size": 12},
    "shared, gated": {"moe_shared_expert_intermediate_size": 12, "moe_shared_expert_gate": True},
    "losses": LOSSES,
    "losses, sigmoid and capacity": {**SIGMOID, **LOSSES, "moe_expert_capacity_factor": 0.75},
    "losses, bias and groups": {**BIASED, **LIMITED, **LOSSES, "moe_router_topk": 4},
    "all-gather": {"moe_token_dispatcher_type": "allgather"},
    "dense and MoE": {"moe_layer_freq": [0, 1], **LOSSES},
    "not gated": {"gated_linear_unit": False, "activation_func": nn.functional.gelu},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_megatrons_own_layer(case: str) -> None:
    options = CASES[case]
    mine, theirs = both(**options)
    told = agree(mine, theirs)
    assert len(told) == (4 if "moe_z_loss_coeff" in options else 0)


def test_expert_biases_move_alike() -> None:
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    config_options = {**BIASED, "moe_router_bias_update_rate": 0.05, "moe_expert_capacity_factor": 0.75}
    mine, theirs = both(**config_options)
    config = transformer_config(**config_options)
    for seed in range(2):
        for model in (mine, theirs):
            run(model, seed)
            _update_router_expert_bias([model], config)
        for own, other in moe_pairs(mine, theirs):
            torch.testing.assert_close(own.moe.gate.expert_bias, other.router.expert_bias)
            for gate in (own.moe.gate, other.router):
                gate.local_tokens_per_expert.zero_()


def test_global_losses_of_two_micro_batches() -> None:
    mine, theirs = both(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.5)
    for seed in (1, 2):
        agree(mine, theirs, seed=seed)
    for own, other in moe_pairs(mine, theirs):
        for gate in (own.moe.gate, other.router):
            gate.reset_global_aux_loss_tracker()
    agree(mine, theirs, seed=4)


def test_padding_counts_in_no_loss() -> None:
    mine, theirs = both(**LOSSES)
    padding = torch.zeros(batch()[0].shape, dtype=torch.bool)
    padding[1, 5:] = True
    padding[2, 2:] = True
    with_padding = agree(mine, theirs, padding_mask=padding)
    mine.zero_grad()
    run(mine)
    assert not torch.allclose(losses()["load_balancing_loss"], with_padding["load_balancing_loss"])


def test_loss_scale_reaches_the_losses() -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    mine, theirs = both(**LOSSES)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(8.0))
    try:
        agree(mine, theirs)
    finally:
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))


def test_recomputed_alike() -> None:
    again = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    options = {**BIASED, **LOSSES}
    mine, theirs = both(**options)
    other = gpt_model(transformer_config(**options, **again), plug_in=True)
    other.load_state_dict(mine.state_dict())
    told = agree(mine, theirs)
    run(other)
    assert {n: v.tolist() for n, v in losses().items()} == {n: v.tolist() for n, v in told.items()}
    for name, p in other.named_parameters():
        torch.testing.assert_close(p.grad, mine.get_parameter(name).grad, msg=name)
    for (a, _), (b, _) in zip(moe_pairs(mine, theirs), moe_pairs(other, theirs), strict=True):
        assert torch.equal(a.moe.gate.local_tokens_per_expert, b.moe.gate.local_tokens_per_expert)
