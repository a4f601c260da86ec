"""Outputs, losses and gradients of a GPT model with the plug-in and with Megatron-Core's own layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from math import ceil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, _get_param_groups, get_standard_config_overrides
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
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

from moesys.errors import ConfigError
from moesys.megatron.arguments import Options
from moesys.megatron.layer import MoESysLayer
from moesys.megatron.specs import gpt_layer_spec, moe_layer_spec, with_plug_in
from moesys.megatron.weights import from_megatron


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
CASES: dict[str, dict[str, Any]] = {
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
    "groups by the best three": {
        **BIASED,
        "num_moe_experts": 12,
        "moe_router_topk": 6,
        "moe_router_num_groups": 3,
        "moe_router_group_topk": 2,
    },
    "one group, which is kept": {
        **BIASED,
        "moe_router_topk": 8,
        "num_moe_experts": 16,
        "moe_router_num_groups": 1,
        "moe_router_group_topk": 1,
        "moe_router_bias_update_rate": 0.0,
    },
    "routed in float64": {**BIASED, **LOSSES, "moe_router_dtype": "fp64"},
    "capacity": {"moe_expert_capacity_factor": 0.75},
    "capacity, padded": {"moe_expert_capacity_factor": 0.75, "moe_pad_expert_input_to_capacity": True},
    "shared": {"moe_shared_expert_intermediate_size": 12},
    "shared, gated": {"moe_shared_expert_intermediate_size": 12, "moe_shared_expert_gate": True},
    "losses": LOSSES,
    "losses, sigmoid and capacity": {**SIGMOID, **LOSSES, "moe_expert_capacity_factor": 0.75},
    "losses, bias and groups": {**BIASED, **LIMITED, **LOSSES, "moe_router_topk": 4},
    "losses per token": {
        "calculate_per_token_loss": True,
        "moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.3],
    },
    "sequences per token": {
        "calculate_per_token_loss": True,
        "moe_router_load_balancing_type": ["seq_aux_loss"],
        "moe_aux_loss_coeff": [0.2],
        "moe_z_loss_coeff": 0.05,
    },
    "all-gather": {"moe_token_dispatcher_type": "allgather"},
    "dense and MoE": {"moe_layer_freq": [0, 1], **LOSSES},
    "not gated": {"gated_linear_unit": False, "activation_func": nn.functional.gelu},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_megatrons_own_layer(case: str) -> None:
    options = CASES[case]
    mine, theirs = both(**options)
    told = agree(mine, theirs)
    kinds = options.get("moe_router_load_balancing_type", [])
    assert len(told) == len(kinds) + ("moe_z_loss_coeff" in options)


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


def test_a_frozen_bias_chooses_and_does_not_move() -> None:
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    options = {**BIASED, "moe_router_bias_update_rate": 0.0}
    mine, theirs = both(**options)
    agree(mine, theirs)
    ((own, other), *_) = moe_pairs(mine, theirs)
    before = own.moe.gate.expert_bias.clone()
    assert before.abs().min() > 0 and own.moe.gate.local_tokens_per_expert.sum() > 0
    _update_router_expert_bias([mine], transformer_config(**options))
    assert torch.equal(own.moe.gate.expert_bias, before) and torch.equal(before, other.router.expert_bias)


def test_what_changes_in_the_configuration_holds_from_the_next_pass_on() -> None:
    """Frameworks raise coefficients in steps, and change capacity for evaluation."""
    mine, theirs = both(**{**LOSSES, "moe_aux_loss_coeff": [0.1, 0.0, 0.0], "moe_expert_capacity_factor": 1.0})
    config = mine.config
    assert config is theirs.config
    changes = (
        {"moe_aux_loss_coeff": [0.3, 0.2, 0.5], "moe_z_loss_coeff": 0.4},
        {"moe_aux_loss_coeff": [0.0, 0.2, 0.0], "moe_z_loss_coeff": None},
        {"moe_router_topk_scaling_factor": 2.5, "moe_expert_capacity_factor": 0.75},
        {"moe_expert_capacity_factor": None, "moe_router_topk_scaling_factor": None},
    )
    for _, other in moe_pairs(mine, theirs):
        # Megatron makes these where the coefficient is not 0 when the layer is built.
        other.router.global_tokens_per_expert, other.router.ga_steps = torch.zeros(8), torch.zeros(())
    agree(mine, theirs)
    for change in changes:
        for name, value in change.items():
            setattr(config, name, value)
        mine.zero_grad()
        theirs.zero_grad()
        agree(mine, theirs)


def test_global_losses_of_micro_batches_with_unlike_padding() -> None:
    mine, theirs = both(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.5)
    for seed, real in enumerate((8, 3, 5)):
        padding = torch.zeros(batch()[0].shape, dtype=torch.bool)
        padding[:, real:] = True
        agree(mine, theirs, seed=seed, padding_mask=padding)


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


def test_padding_takes_no_place_of_a_capacity() -> None:
    """Megatron's own router lets it; real tokens are dropped then."""
    layer = MoESysLayer(transformer_config(moe_expert_capacity_factor=0.5))
    padding = torch.zeros(3, 8, dtype=torch.bool)
    padding[:, 3:] = True
    kept: list[Any] = []
    layer.moe.gate.register_forward_hook(lambda *parts: kept.append(parts[-1]))
    x = torch.randn(8, 3, 16)
    layer(x, padding_mask=padding)
    layer(x[:3])
    masked, alone = kept
    assert masked.token_A.max() < 9, "of 3 positions of 3 sequences"
    limit = ceil(0.5 * 24 * 2 / 8)
    wanted = alone.load_E
    assert torch.equal(masked.expert_A.bincount(minlength=8), wanted.clamp(max=limit))
    assert torch.equal(masked.load_E, wanted) and wanted.sum() == 9 * 2


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
        plain, recomputed = (layer.moe.statistics.take() for layer in (a, b))
        assert plain["calls"] == 1 and plain.keys() == recomputed.keys()
        for name, value in plain.items():
            torch.testing.assert_close(recomputed[name], value)


MTP = {
    "mtp_num_layers": 2, "mtp_use_repeated_layer": True, "moe_router_load_balancing_type": ["aux_loss"],
    "moe_aux_loss_coeff": [0.1], "moe_z_loss_coeff": 0.05,
}  # fmt: skip


if "is_mtp_layer" in signature(MoELayer).parameters:  # from 0.17 on

    def test_losses_of_multi_token_prediction_are_told_after_the_decoders() -> None:
        config = transformer_config(**MTP)
        theirs = gpt_model(config, False).decoder.layers[1].mlp
        theirs = type(theirs)(config, theirs.submodules, pg_collection=get_default_pg_collection(), is_mtp_layer=True)
        mine = MoESysLayer(config, pg_collection=get_default_pg_collection(), is_mtp_layer=True, name="mtp")
        mine.moe.load_state_dict(from_megatron(theirs.state_dict()))
        told = []
        losses()
        for layer in (mine, theirs):
            layer.set_layer_number(1)
            x = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(2))
            for _ in range(2):
                layer(x)[0].sum().backward()
            told.append(losses())
        assert set(told[0]) == {"load_balancing_loss", "z_loss"}
        for name, found in told[0].items():
            assert len(found) == 4 and found[2] > 0 and found[[0, 1, 3]].abs().sum() == 0, name
            torch.testing.assert_close(found, told[1][name])
        torch.testing.assert_close(mine.moe.gate.projection.weight.grad, theirs.router.weight.grad)


def test_capacity_by_position(monkeypatch) -> None:
    # Megatron takes the first rows by the largest of zeros and ones, and hopes that topk keeps their order.
    monkeypatch.setattr(torch, "topk", first_of_equals)
    agree(*both(moe_expert_capacity_factor=0.75, moe_token_drop_policy="position"))


def first_of_equals(x: torch.Tensor, k: int, dim: int = -1, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found = x.sort(dim=dim, descending=True, stable=True)
    return found.values.narrow(dim, 0, k), found.indices.narrow(dim, 0, k)


@pytest.mark.parametrize("gate", ["expert_choice", "sinkhorn", "base"])
def test_other_gates_train(gate: str) -> None:
    model = gpt_model(transformer_config(moe_router_topk=1, moe_router_pre_softmax=True), True, Options(gate=gate))
    run(model)
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_jitter_changes_each_pass_and_stays_small() -> None:
    model = gpt_model(transformer_config(moe_input_jitter_eps=0.01, moe_router_topk=8), plug_in=True)
    plain = gpt_model(transformer_config(moe_router_topk=8), plug_in=True)
    plain.load_state_dict(model.state_dict())
    first, second, without = run(model), run(model), run(plain)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, without, rtol=0.05, atol=0.05)


def test_counts_and_bias_stay_wide() -> None:
    gate = gpt_model(transformer_config(**BIASED, **LOSSES), plug_in=True).bfloat16().decoder.layers[0].mlp.moe.gate
    assert gate.projection.weight.dtype == torch.bfloat16
    assert {gate.expert_bias.dtype, gate.local_tokens_per_expert.dtype, gate.global_load_sum.dtype} == {torch.float32}


def test_megatrons_optimizer_lets_no_bias_decay() -> None:
    """Stacked biases of experts have more dims than one: it must know them by their names."""
    options = {"add_bias_linear": True, "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    model = gpt_model(transformer_config(**options), plug_in=True)
    optimizer = OptimizerConfig(optimizer="adam", lr=0.1)
    groups = _get_param_groups([model], optimizer, get_standard_config_overrides(optimizer))
    multiple = {id(p): group["wd_mult"] for group in groups for p in group["params"]}
    found = {name: multiple[id(p)] for name, p in model.named_parameters()}
    assert {name for name, times in found.items() if times == 0.0} == {
        name for name in found if "norm" in name or "bias" in name
    }
    state = model.decoder.layers[0].mlp.moe.state_dict()
    assert state["experts.fc1_bias"].shape == (8, 2, 12) and state["experts.fc2_bias"].shape == (8, 16)
    for bias in ("experts.fc1_bias", "experts.fc2_bias"):
        state[bias] = torch.ones_like(state[bias])
    model.decoder.layers[0].mlp.moe.load_state_dict(state)
    assert all(bool(bias.eq(1).all()) for bias in model.decoder.layers[0].mlp.moe.experts.biases())


def test_one_block_for_all() -> None:
    block = gpt_layer_spec(transformer_config(), transformer_engine=False)
    assert block.submodules.mlp == moe_layer_spec()
    theirs = get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False)
    before = theirs.submodules.mlp
    assert "module" not in vars(before) or before.module is MoELayer
    assert with_plug_in([theirs])[0].submodules.mlp == moe_layer_spec()
    assert theirs.submodules.mlp is before


def test_takes_what_later_versions_pass() -> None:
    """From 0.18 on: process groups and a name; the layer's number comes later."""
    config = transformer_config()
    layer = MoESysLayer(config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False, name="mlp")
    assert layer.layer_number is None
    layer.set_layer_number(2)
    out, bias = layer(torch.randn(4, 3, 16), intermediate_tensors=None, padding_mask=None)
    assert out.shape == (4, 3, 16) and bias is None and layer.moe.layer_number == 2


def test_a_layer_that_megatron_does_not_initialise_starts_by_itself() -> None:
    config = transformer_config(
        perform_initialization=False, add_bias_linear=True, moe_router_load_balancing_type="global_aux_loss",
        moe_aux_loss_coeff=0.1,
    )  # fmt: skip
    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote to with NaN
    try:
        layer = MoESysLayer(config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (*layer.parameters(), *layer.buffers()))
    assert layer(torch.randn(4, 3, 16))[0].isfinite().all()


def test_what_the_groups_do_not_divide_is_refused() -> None:
    groups = get_default_pg_collection()
    groups.ep = SimpleNamespace(size=lambda: 3, rank=lambda: 0)
    with pytest.raises(ConfigError, match=r"expert_model_parallel_size\(3\) must divide num_moe_experts\(8\)"):
        MoESysLayer(transformer_config(), pg_collection=groups)


def test_tensor_parallelism_without_sequence_parallelism_is_refused() -> None:
    layer = MoESysLayer(transformer_config())
    layer.groups = replace(layer.groups, tp=SimpleNamespace(size=lambda: 2))
    with pytest.raises(ConfigError, match=r"sequence_parallel: must be on .* tensor_model_parallel_size\(2\)"):
        layer(torch.randn(4, 3, 16))


def test_a_refusal_arrives_whole_through_megatrons_builder() -> None:
    with pytest.raises(ConfigError) as error:
        gpt_model(transformer_config(moe_router_force_load_balancing=True), plug_in=True)
    text = str(error.value)
    assert text.startswith("1 problem in the configuration\n  moe_router_force_load_balancing is True: not in the plug")
    assert text.endswith("or use Megatron's own layer")


def hybrid(plug_in: bool) -> nn.Module:
    """Attention and MoE blocks in turn, by the pattern of a hybrid model."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from moesys.megatron.model import Norm

    config = transformer_config(num_layers=4)
    block = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    whole = block.submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=Norm, self_attention=whole.self_attention, self_attn_bda=whole.self_attn_bda
    )
    experts = TransformerLayerSubmodules(pre_mlp_layernorm=Norm, mlp=whole.mlp, mlp_bda=whole.mlp_bda)
    stack = ModuleSpec(
        module=MambaStack,
        submodules=MambaStackSubmodules(
            attention_layer=replace(block, submodules=attention), moe_layer=replace(block, submodules=experts)
        ),
    )
    spec = with_plug_in(stack) if plug_in else stack
    torch.manual_seed(5)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    by_text = "hybrid_override_pattern" in signature(MambaStack).parameters  # up to 0.17
    pattern = {"hybrid_override_pattern": "*E*E"} if by_text else {"layer_type_list": list("*E*E")}
    return MambaStack(config, spec.submodules, post_layer_norm=False, pg_collection=groups, **pattern)


def test_blocks_of_a_hybrid_model() -> None:
    mine, theirs = hybrid(plug_in=True), hybrid(plug_in=False)
    copy_weights(mine, theirs)
    assert [layer.layer_number for layer, _ in moe_pairs(mine, theirs)] == [2, 4]
    x = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(2))
    outputs = [model(x, None) for model in (mine, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for out in outputs:
        out.square().sum().backward()
    compare_gradients(mine, theirs)
