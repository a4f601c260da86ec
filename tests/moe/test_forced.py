"""Routing by force: the load is known, the weights stay the gate's own."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from gate_cases import drawn, routed, vectors

from moesys.moe import Tokens, noise
from moesys.moe.gates import PrototypeGate, TopKGate
from moesys.moe.gates.base import BaseGate
from moesys.moe.gates.forced import Balanced, Skewed
from moesys.moe.gates.hash import HashGate
from moesys.moe.gates.random import RandomGate
from moesys.moe.gates.sinkhorn import SinkhornGate
from moesys.moe.losses import Balance

E, K, H = 6, 2, 16


@pytest.mark.parametrize(("experts", "k"), [(6, 1), (6, 2), (6, 4), (5, 3), (4, 4)])
def test_balanced_is_round_robin(experts, k):
    number = torch.arange(experts * 10) + 17
    chosen = Balanced(experts, k)(Tokens(number))
    assert chosen.flatten().bincount().tolist() == [k * 10] * experts
    assert (chosen.sort(-1).values.diff() > 0).all()
    assert chosen[0].tolist() == [(17 * k + j) % experts for j in range(k)]


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.5])
def test_skewed_draws_without_replacement_by_zipfs_law(skew):
    tokens = 40_000
    number = torch.arange(tokens)
    chosen = Skewed(4, 2, skew, noise.key(0, "x"))(Tokens(number))
    chance = [1 / (e + 1) ** skew for e in range(4)]
    total = sum(chance)
    for first, second in permutations(range(4), 2):
        expected = tokens * chance[first] / total * chance[second] / (total - chance[first])
        found = ((chosen[:, 0] == first) & (chosen[:, 1] == second)).sum().item()
        assert abs(found - expected) < 5 * expected**0.5 + 5
    assert torch.equal(Skewed(4, 2, skew, noise.key(0, "x"))(Tokens(number.flip(0))), chosen.flip(0))
    assert not torch.equal(Skewed(4, 2, skew, noise.key(1, "x"))(Tokens(number)), chosen)


GATES = {
    "top_k": lambda: TopKGate(H, E, K),
    "sigmoid": lambda: TopKGate(H, E, K, score="sigmoid", balance=Balance(balance=0.01)),
    "prototype": lambda: PrototypeGate(H, E, K, normalize=False),
    "sinkhorn": lambda: SinkhornGate(H, E, K),
    "base": lambda: BaseGate(H, E),
    "hash": lambda: HashGate(E, K, 7),
    "random": lambda: RandomGate(E, K, 7),
}


@pytest.mark.parametrize("kind", GATES)
def test_any_gate_that_sends_tokens_to_k_experts_can_be_forced(kind):
    gate = drawn(GATES[kind]())
    k = 1 if kind == "base" else K
    gate.forced = Balanced(E, k)
    x, number = vectors(18), torch.arange(18) + 5
    weights = routed(gate, x, Tokens(number, id_T=number))
    wanted = Balanced(E, k)(Tokens(number))
    assert torch.equal((~weights.isnan()).nonzero()[:, 1].view(-1, k), wanted.sort(-1).values)
    found = weights.gather(1, wanted)
    if kind in ("hash", "random"):
        assert (found == 1 / k).all()
        return
    logits = x @ gate.projection.weight.T
    score = {
        "top_k": logits.softmax(-1),
        "sigmoid": logits.sigmoid(),
        "prototype": logits.view(-1, K, E // K).softmax(-1).flatten(1),
        "sinkhorn": logits.softmax(-1),
        "base": logits.sigmoid(),
    }[kind].gather(1, wanted)
    if kind in ("top_k", "sigmoid"):
        score = score / score.sum(-1, keepdim=True)
    torch.testing.assert_close(found, score)
    found.square().sum().backward()
    assert gate.projection.weight.grad.abs().min() > 0
