"""Gates that choose nothing, against their papers' formulas."""

from __future__ import annotations

import pytest
import torch
from gate_cases import H, assert_same_gradients, feed_forward, layer, vectors

from moesys.moe.gates.smear import SmearGate
from moesys.moe.gates.soft import SoftGate

B, S, E = 3, 5, 4


@pytest.mark.parametrize("slots", [1, 3])
def test_soft_moe_is_the_papers_formula(slots):
    built = layer(SoftGate(H, E, slots))
    x = vectors(B * S).view(B, S, H)
    out = built(x)
    phi = built.gate.projection.weight.T
    expected = []
    for sequence in x:
        logits = sequence @ phi
        dispatch = logits.exp() / logits.exp().sum(0, keepdim=True)
        combine = logits.exp() / logits.exp().sum(1, keepdim=True)
        inputs = dispatch.T @ sequence
        outputs = torch.stack([feed_forward(built.experts, p // slots, inputs[p]) for p in range(E * slots)])
        expected.append(combine @ outputs)
    torch.testing.assert_close(out, torch.stack(expected))
    target = vectors(B * S, seed=2).view_as(x)
    assert_same_gradients(built, (out * target).sum(), (torch.stack(expected) * target).sum())
    assert built.statistics.take()["load"].tolist() == [B * slots] * E


@pytest.mark.parametrize("bias", [False, True])
def test_smear_is_one_merged_expert_per_sequence(bias):
    built = layer(SmearGate(H, E), bias=bias)
    x = vectors(B * S).view(B, S, H)
    out = built(x)
    expected = []
    for sequence in x:
        logits = sequence.mean(0) @ built.gate.projection.weight.T
        shares = logits.exp() / logits.exp().sum()
        merged = {n: sum(shares[e] * w[e] for e in range(E)) for n, w in built.experts.named_parameters()}
        gated, up = (sequence @ merged["fc1"][:, i] + merged.get("fc1_bias", torch.zeros(2, 1))[i] for i in (0, 1))
        y = (gated * gated.sigmoid() * up) @ merged["fc2"]
        expected.append(y + merged.get("fc2_bias", torch.zeros(1)))
    torch.testing.assert_close(out, torch.stack(expected))
    target = vectors(B * S, seed=2).view_as(x)
    assert_same_gradients(built, (out * target).sum(), (torch.stack(expected) * target).sum())
    load = built.statistics.take()["load"]
    assert load.sum().item() == pytest.approx(B * S)


@pytest.mark.parametrize("gate", [SoftGate(H, E, 2), SmearGate(H, E)], ids=lambda gate: type(gate).__name__)
def test_sequences_know_nothing_of_each_other(gate):
    built = layer(gate)
    x = vectors(B * S).view(B, S, H)
    torch.testing.assert_close(built(x)[1:2], built(x[1:2]))


@pytest.mark.parametrize("gate", [SoftGate(H, E, 2), SmearGate(H, E)], ids=lambda gate: type(gate).__name__)
def test_arithmetic_of_shares_is_float32_in_a_bfloat16_model(gate):
    built = layer(gate).to(torch.bfloat16)
    x = vectors(B * S).view(B, S, H).to(torch.bfloat16)
    out = built(x)
    assert out.dtype == torch.bfloat16
    exact = built.double()(x.double())
    assert (out.double() - exact).norm() < 0.02 * exact.norm()
