"""BASE: the assignment is the best one there is."""

from __future__ import annotations

from itertools import product
from math import ceil

import pytest
import torch
from gate_cases import drawn, routed, vectors
from parts import together

from moesys.moe import Tokens
from moesys.moe.gates.base import BaseGate, balanced_assignment
from moesys.moe.routing import MicroBatch

H, E = 16, 4


def brute_force(scores: list[list[int]], places: int) -> int:
    """The largest sum of scores over all assignments with at most `places` tokens per expert."""
    experts = range(len(scores[0]))
    every = product(experts, repeat=len(scores))
    legal = (a for a in every if max(a.count(e) for e in experts) <= places)
    return max(sum(row[e] for row, e in zip(scores, a, strict=True)) for a in legal)


@pytest.mark.parametrize("seed", range(40))
def test_no_assignment_is_better(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(1, 8, (), generator=generator))
    experts = int(torch.randint(1, 5, (), generator=generator))
    # Few different scores: ties are the hard part.
    scores = torch.randint(-4, 5, (tokens, experts), generator=generator)
    found = balanced_assignment(scores)
    assert found.bincount(minlength=experts).max() <= ceil(tokens / experts)
    assert scores.gather(1, found[:, None]).sum().item() == brute_force(scores.tolist(), ceil(tokens / experts))


@pytest.mark.parametrize("scores", ["drawn", "alike", "repeated", "lopsided"])
def test_larger_assignments_satisfy_the_conditions_of_optimality(scores):
    tokens, experts = 240, 8
    s = (vectors(tokens, hidden=experts) * 4096).long()
    if scores == "alike":
        s = torch.zeros_like(s)
    elif scores == "repeated":
        s = s[:12].repeat(20, 1)
    elif scores == "lopsided":
        s[:, 0] += 100_000
    found = balanced_assignment(s)
    assert found.bincount(minlength=experts).tolist() == [tokens // experts] * experts
    # No cycle of moves gains: with the cheapest loss of each move as lengths, no cycle is shorter than 0.
    loss = s.gather(1, found[:, None]) - s
    length = torch.stack([loss[found == e].min(0).values for e in range(experts)])
    for middle in range(experts):
        length = torch.minimum(length, length[:, middle, None] + length[middle])
    assert length.diagonal().min() == 0


@pytest.mark.parametrize("tokens", [24, 23, 3, 1])
def test_the_gate_balances_in_training_and_not_in_evaluation(tokens):
    gate, x = drawn(BaseGate(H, E)), vectors(tokens) + 0.5
    logits = x @ gate.projection.weight.T
    found = routed(gate, x)
    assert (~found.isnan()).sum(1).tolist() == [1] * tokens
    assert (~found.isnan()).sum(0).max() <= ceil(tokens / E)
    torch.testing.assert_close(found[~found.isnan()], logits[~found.isnan()].sigmoid())
    rounded = (logits.detach() * 4096).round().long()
    assert torch.equal((~found.isnan()).int().argmax(1), balanced_assignment(rounded))
    alone = routed(gate.eval(), x)
    assert torch.equal((~alone.isnan()).int().argmax(1), logits.argmax(1))


def test_a_micro_batch_in_parts_is_assigned_as_a_whole():
    gate, x = drawn(BaseGate(H, E)), vectors(24)
    parts = [torch.arange(0, 24, 2), torch.arange(1, 24, 2)]
    found = together(2, lambda n, scope: routed(gate, x[parts[n]], Tokens(parts[n]), scope))
    torch.testing.assert_close(torch.cat(found), routed(gate, x)[torch.cat(parts)], equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_a_token_that_is_not_finite_stops_nobody(value):
    gate = drawn(BaseGate(H, E))
    x = vectors(16)
    x[3] = value
    routing = gate(x, Tokens(torch.arange(16)), MicroBatch())
    assert routing.expert_A.bincount(minlength=E).tolist() == [4] * E
