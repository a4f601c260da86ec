"""Zero-computation experts against their definitions, one token at a time."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from torch import Tensor

from moesys.moe import MoELayer, Tokens
from moesys.moe.capacity import Capacity
from moesys.moe.experts import Experts
from moesys.moe.gates import TopKGate
from moesys.moe.losses import Balance
from moesys.moe.routing import MicroBatch
from moesys.moe.zero import ZeroExperts, ZeroRule

T, H, F, E, K = 20, 8, 6, 4, 3
ZEROS, COPIES, CONSTANTS = 1, 2, 2
Z = ZEROS + COPIES + CONSTANTS


def build(rule: ZeroRule, counts: tuple[int, int, int], capacity: Capacity | None = None) -> MoELayer:
    torch.manual_seed(0)
    gate = TopKGate(H, E, K, zero=rule, capacity=capacity, balance=Balance(balance=0.2), bias_rate=0.1)
    zero = ZeroExperts(H, *counts) if sum(counts[1:]) else None
    layer = MoELayer(gate, Experts(E, H, F), zero=zero).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def one_expert(layer: MoELayer, x: Tensor, e: int) -> Tensor:
    """What candidate e gives for one token [H]."""
    if e < E:
        gated, up = (x @ layer.experts.fc1[e, :, part] for part in (0, 1))
        return (gated / (1 + (-gated).exp()) * up) @ layer.experts.fc2[e]
    e -= E
    if e < ZEROS:
        return torch.zeros_like(x)
    if e < ZEROS + COPIES:
        return x
    j = e - ZEROS - COPIES
    alpha = (layer.zero.mix.weight[2 * j : 2 * j + 2] @ x).softmax(0)
    return alpha[0] * x + alpha[1] * layer.zero.constant.weight[:, j]


@pytest.mark.parametrize("factor", [None, 0.6])
def test_moe_plus_plus(factor):
    tau = 0.5
    rule = ZeroRule(E, Z, "moe++", tau)
    layer = build(rule, (ZEROS, COPIES, CONSTANTS), Capacity(factor, drop="position"))
    x = torch.randn(1, T, H, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, T, H, dtype=torch.float64)
    out = layer(x)
    (out * target).sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": x.grad.clone()}
    totals = layer.statistics.take()
    layer.zero_grad()
    x.grad = None

    p = (x[0] @ layer.gate.projection.weight.T).softmax(-1)
    limit = T if factor is None else ceil(factor * tau * T * K / (tau * E + Z))
    rows, taken, load = [], [0] * E, torch.zeros(E + Z, dtype=torch.float64)
    for t in range(T):
        row = torch.zeros(H, dtype=torch.float64)
        best = sorted(range(E + Z), key=lambda e, t=t: -p[t, e].item())[:K]
        for e in best:
            load[e] += 1
            if e < E and taken[e] == limit:
                continue
            if e < E:
                taken[e] += 1
            row = row + p[t, e] / p[t, best].sum() * one_expert(layer, x[0, t], e)
        rows.append(row)
    eta = torch.tensor([1.0] * E + [tau] * Z, dtype=torch.float64)
    loss = 0.2 * (E + Z) * (eta * load / (T * K) * p.mean(0)).sum()
    ((torch.stack(rows) * target[0]).sum() + loss).backward()
    torch.testing.assert_close(out[0], torch.stack(rows))
    for name, parameter in (*layer.named_parameters(), ("x", x)):
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
        assert parameter.grad.abs().max() > 0
    assert totals["load"].tolist() == load[:E].tolist() and totals["zero"] == load[E:].sum() > 0
    assert totals["dropped"] == (load[:E].sum() - sum(taken)) and (factor is None or totals["dropped"] > 0)
    torch.testing.assert_close(totals["balance"], loss.detach())


def test_adamoe():
    """Its null experts: of the chosen, true experts' weights sum to 1; the loss sees the nulls' mean load."""
    nulls = 3
    layer = build(ZeroRule(E, nulls, "adamoe"), (nulls, 0, 0))
    assert layer.zero is None
    x = torch.randn(1, T, H, dtype=torch.float64)
    out = layer(x)
    p = (x[0] @ layer.gate.projection.weight.T).softmax(-1)
    best = p.topk(K).indices
    used = torch.zeros(T, dtype=torch.int64)
    for t in range(T):
        true = [e for e in best[t].tolist() if e < E]
        used[t] = len(true)
        total = sum(p[t, e] for e in true)
        expected = sum((p[t, e] / total * one_expert(layer, x[0, t], e) for e in true), torch.zeros(H).double())
        torch.testing.assert_close(out[0, t], expected)
    assert used.unique().numel() > 2, "every token used as many experts"
    f = torch.bincount(best.flatten(), minlength=E + nulls) / (T * K)
    f[E:] = f[E:].mean()
    loss = 0.2 * (E + nulls) * (f * p.mean(0)).sum()
    torch.testing.assert_close(layer.statistics.take()["balance"], loss.detach())


def test_a_token_may_use_zero_experts_alone():
    layer = build(ZeroRule(E, 3, "adamoe"), (3, 0, 0))
    torch.nn.init.zeros_(layer.gate.projection.weight)
    layer.gate.selection_bias[E:] = 1.0
    x = torch.randn(1, T, H, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.abs().max() == 0 and x.grad.abs().max() == 0
    assert layer.experts.fc1.grad.abs().max() == 0


def test_padding_holds_true_experts_alone():
    layer = build(ZeroRule(E, Z), (ZEROS, COPIES, CONSTANTS), Capacity(0.5, pad=True))
    routing = layer.gate(torch.randn(T, H).double(), Tokens(torch.arange(T)), MicroBatch())
    assert routing.expert_A.bincount().tolist() == [ceil(0.5 * T * K / (E + Z))] * E


def test_the_model_may_be_bfloat16():
    layer = build(ZeroRule(E, Z), (ZEROS, COPIES, CONSTANTS)).to(torch.bfloat16)
    assert layer(torch.randn(1, T, H, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.float()
    assert layer(torch.randn(1, T, H, dtype=torch.bfloat16)).dtype == torch.bfloat16
