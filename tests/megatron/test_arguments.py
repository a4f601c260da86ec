"""What is read of a `TransformerConfig` and of flags; what is refused."""

from __future__ import annotations

from argparse import ArgumentParser
from types import SimpleNamespace

import pytest
from megatron_sides import transformer_config
from torch.nn import functional

from moesys.errors import ConfigError
from moesys.megatron.arguments import Options, from_args, from_transformer_config, moe_args


def test_reads_a_deepseek_configuration():
    moe = from_transformer_config(
        transformer_config(
            moe_router_topk=4, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=0.01, moe_router_num_groups=4, moe_router_group_topk=2,
            moe_router_topk_scaling_factor=2.5, moe_router_load_balancing_type=["seq_aux_loss", "aux_loss"],
            moe_aux_loss_coeff=[1e-4, 1e-3], moe_z_loss_coeff=0.1, moe_shared_expert_intermediate_size=24,
        )
    )  # fmt: skip
    assert (moe.experts, moe.top_k, moe.ffn_hidden, moe.activation) == (8, 4, 12, "swiglu")
    assert (moe.gate.score, moe.gate.groups, moe.gate.groups_kept, moe.gate.group_score) == ("sigmoid", 4, 2, "top2")
    assert (moe.bias_rate, moe.scale, moe.z_loss) == (0.01, 2.5, 0.1)
    assert (moe.sequence_balance_loss, moe.balance_loss, moe.global_balance_loss) == (1e-4, 1e-3, 0.0)
    assert (moe.shared_width, moe.shared_mix, moe.capacity_factor) == (24, "add", None)


def test_reads_a_switch_configuration():
    moe = from_transformer_config(
        transformer_config(
            moe_router_topk=1, moe_router_pre_softmax=True, moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.01, moe_expert_capacity_factor=1.25, moe_pad_expert_input_to_capacity=True,
            moe_token_drop_policy="position", gated_linear_unit=False, activation_func=functional.relu,
            moe_input_jitter_eps=0.1,
        )
    )  # fmt: skip
    assert (moe.top_k, moe.normalize, moe.activation, moe.gate.jitter) == (1, False, "relu", 0.1)
    assert (moe.capacity_factor, moe.pad_to_capacity, moe.drop, moe.balance_loss) == (1.25, True, "position", 0.01)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
         r"moe_apply_probs_on_input is True: not in the plug-in: weights multiply the experts' outputs"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, r"is sinkhorn.*\n *remedy: .*--moesys-gate sinkhorn"),
        ({"moe_router_topk": 8, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
         r"moe_router_topk\(8\) // moe_router_group_topk\(2\) of a group's .* from 1 to the experts of a group, 2"),
        ({"moe_router_topk": 2, "moe_router_num_groups": 4, "moe_router_group_topk": 3}, r"remedy: from 1 to 2"),
        ({"moe_shared_expert_intermediate_size": 12, "add_bias_linear": True}, r"add_bias_linear is True: shared exp"),
        ({"activation_func": functional.tanh}, r"activation_func is tanh: the plug-in's experts have"),
        ({"moe_router_force_load_balancing": True}, r"moe_router_force_load_balancing is True"),
    ],
)  # fmt: skip
def test_refuses_what_it_cannot_represent(options, text):
    with pytest.raises(ConfigError, match=text):
        from_transformer_config(transformer_config(**options))


def test_names_everything_that_is_wrong_at_once():
    wrong = transformer_config(moe_router_force_load_balancing=True, activation_func=functional.tanh)
    with pytest.raises(ConfigError, match="2 problems"):
        from_transformer_config(wrong)


def test_flags():
    parser = moe_args(ArgumentParser())
    assert from_args(parser.parse_args([])) == Options()
    words = "--moesys-gate sinkhorn --moesys-dispatch hierarchical --moesys-dispatch-chunks 2"
    given = from_args(parser.parse_args([*words.split(), "--moesys-dispatch-payload", "fp8"]))
    assert given == Options("sinkhorn", "hierarchical", 2, "fp8")


@pytest.mark.parametrize(
    ("megatrons", "given", "kind"),
    [("alltoall", None, "all_to_all"), ("allgather", None, "all_gather"), ("flex", None, "all_to_all"),
     ("allgather", "hierarchical", "hierarchical")],
)  # fmt: skip
def test_tokens_travel_as_megatron_says_unless_told_otherwise(megatrons, given, kind):
    config = SimpleNamespace(moe_token_dispatcher_type=megatrons, moe_shared_expert_overlap=True)
    found = Options(dispatch=given).dispatch_config(config)
    assert (found.kind, found.overlap_shared) == (kind, True)
