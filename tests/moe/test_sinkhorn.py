"""Sinkhorn routing against the definition of its scaling, and against Megatron-Core's own function."""

from __future__ import annotations

import pytest
import torch
from gate_cases import drawn, routed, vectors
from parts import together

from moesys.moe import Tokens
from moesys.moe.gates.sinkhorn import SinkhornGate, expert_factors

H, E = 16, 6


def scaled(logits: torch.Tensor, rounds: int = 2000) -> torch.Tensor:
    """exp(logits) scaled to sums 1 / T per token and 1 / E per expert."""
    m = logits.exp()
    for _ in range(rounds):
        m = m / m.sum(1, keepdim=True) / m.shape[0]
        m = m / m.sum(0, keepdim=True) / m.shape[1]
    return m


def test_factors_give_equal_sums():
    logits = vectors(50, hidden=E)
    m = (logits + expert_factors(logits)).softmax(-1)
    torch.testing.assert_close(m.sum(0), torch.full((E,), 50 / E, dtype=m.dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(m / 50, scaled(logits), rtol=1e-6, atol=0)
    # Far from balance, and far from numbers that exp can take.
    logits = 300 * vectors(50, hidden=E)
    assert expert_factors(logits).isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_training_is_balanced_and_evaluation_is_not(k):
    gate, x = drawn(SinkhornGate(H, E, k)), vectors(60) + 0.5
    logits = x @ gate.projection.weight.T
    for training, by in ((True, scaled(logits)), (False, logits)):
        found = routed(gate.train(training), x)
        wanted = torch.zeros_like(logits, dtype=torch.bool).scatter(1, by.topk(k).indices, True)
        assert torch.equal(~found.isnan(), wanted)
        weights = logits.sigmoid() if k == 1 else logits.softmax(-1)
        torch.testing.assert_close(found[wanted], weights[wanted])
    load = scaled(logits).topk(k).indices.flatten().bincount(minlength=E)
    plain = logits.topk(k).indices.flatten().bincount(minlength=E)
    assert load.max() < plain.max()


def test_the_choice_is_megatrons():
    sinkhorn = pytest.importorskip("megatron.core.transformer.moe.moe_utils").sinkhorn
    gate, x = drawn(SinkhornGate(H, E, 2)).float(), vectors(60).float()
    logits = x @ gate.projection.weight.T
    wanted = torch.zeros_like(logits, dtype=torch.bool).scatter(1, sinkhorn(logits).topk(2).indices, True)
    assert torch.equal(~routed(gate, x).isnan(), wanted)


def test_a_micro_batch_in_parts_is_balanced_as_a_whole():
    gate, x = drawn(SinkhornGate(H, E, 2)), vectors(24)
    parts = [torch.arange(0, 24, 2), torch.arange(1, 24, 2)]
    found = together(2, lambda n, scope: routed(gate, x[parts[n]], Tokens(parts[n]), scope))
    torch.testing.assert_close(torch.cat(found), routed(gate, x)[torch.cat(parts)], equal_nan=True)


def test_gradients_pass_through_the_weights_alone():
    gate, x = drawn(SinkhornGate(H, E, 2)), vectors(8)
    found = routed(gate, x)
    weights = (x @ gate.projection.weight.T).softmax(-1)
    (ours,) = torch.autograd.grad(found[~found.isnan()].square().sum(), gate.projection.weight)
    (theirs,) = torch.autograd.grad(weights[~found.isnan()].square().sum(), gate.projection.weight)
    torch.testing.assert_close(ours, theirs)
