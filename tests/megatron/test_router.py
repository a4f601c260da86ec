"""The plug-in's gate beside Megatron-Core's own router: capacity, and who goes when an expert is full."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    get_capacity,
    topk_routing_with_score_function,
)
from megatron_sides import transformer_config
from torch import Tensor

from moesys.megatron import settings
from moesys.megatron.arguments import from_transformer_config
from moesys.megatron.build import build_megatron_gate
from moesys.megatron.scope import MegatronTokens
from moesys.moe.routing import MicroBatch


def test_capacity_is_rounded_as_megatron_rounds():
    assert settings.MegatronCapacity(1.1).limit(True, 400, 2, 8) == get_capacity(800, 8, 1.1) == 111
    for tokens in range(1, 200, 7):
        for factor in (0.1, 0.7, 1.05, 1.1, 1.25, 2.0):
            for k, experts in ((1, 3), (2, 8), (4, 10), (6, 64)):
                expected = min(get_capacity(tokens * k, experts, factor), tokens)
                assert settings.MegatronCapacity(factor).limit(True, tokens, k, experts) == expected


def routed(logits_TE: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Weights [T, E] of the plug-in's gate and of Megatron's functions, 0 where a token does not go."""
    config = transformer_config(moe_router_topk=2, **options)
    gate = build_megatron_gate(from_transformer_config(config), config)
    gate.projection.forward = lambda _: logits_TE
    tokens = MegatronTokens(torch.arange(len(logits_TE)), 1)
    routing = gate(logits_TE, tokens, MicroBatch())
    mine = torch.zeros_like(logits_TE)
    mine[routing.token_A, routing.expert_A] = routing.weight_A.detach()
    theirs = topk_routing_with_score_function(
        logits_TE, 2, config.moe_router_pre_softmax, score_function=config.moe_router_score_function
    )
    dropped, _ = apply_router_token_dropping(*theirs, 2, config.moe_expert_capacity_factor)
    return mine, dropped


@pytest.mark.parametrize("options", [{}, {"moe_router_pre_softmax": True}, {"moe_router_score_function": "sigmoid"}])
def test_drops_compare_every_bit_of_the_weights(options):
    """Tokens nearly alike: weights differ in their last bits."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        logits = torch.randn(1, 8, generator=g) + 1e-5 * torch.randn(96, 8, generator=g)
        logits[48:] = torch.randn(48, 8, generator=g)
        mine, theirs = routed(logits, moe_expert_capacity_factor=0.5, **options)
        # Of weights that are the same number it does not matter, nor say, which go.
        assert torch.equal((mine != 0).sum(0), (theirs != 0).sum(0))
        torch.testing.assert_close(mine.sort(0).values, theirs.sort(0).values, rtol=1e-6, atol=0)


def test_weights_that_are_alike_in_every_bit_go_by_their_place():
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).repeat(32, 1)
    mine, _ = routed(logits, moe_expert_capacity_factor=1.0)
    kept = (mine != 0).any(1)
    assert kept[: int(kept.sum())].all() and 0 < kept.sum() < 32


def test_of_one_loss_named_twice_the_first_coefficient_counts():
    config = SimpleNamespace(moe_router_load_balancing_type=["aux_loss", "aux_loss"], moe_aux_loss_coeff=[0.1, 0.2])
    assert settings.coefficients(config) == {"aux_loss": 0.1}  # as Megatron, which takes the first
