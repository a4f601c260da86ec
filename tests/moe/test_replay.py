"""Replay: recorded experts, the gate's own weights."""

from __future__ import annotations

import pytest
import torch
from gate_cases import drawn, routed, vectors

from moesys.moe import Tokens
from moesys.moe.gates.replay import ReplayGate

H, E = 16, 5
TABLE = torch.tensor([[0, 3], [2, -1], [4, 1], [-1, -1]], dtype=torch.int16)


@pytest.mark.parametrize("normalize", [True, False])
def test_experts_follow_the_table_and_weights_the_softmax(normalize):
    gate = drawn(ReplayGate(H, E, normalize, scale=2.5))
    gate.load(100, TABLE)
    number = torch.tensor([100, 101, 102, 103, 104, 107, 99])
    x = vectors(7)
    found = routed(gate, x, Tokens(number))
    softmax = (x @ gate.projection.weight.T).softmax(-1)
    for t, row in enumerate([0, 1, 2, 3, 0, 3, 3]):
        experts = [e for e in TABLE[row].tolist() if e >= 0]
        assert set((~found[t].isnan()).nonzero().flatten().tolist()) == set(experts)
        total = sum(softmax[t, e] for e in experts) if normalize else 1.0
        for e in experts:
            torch.testing.assert_close(found[t, e], 2.5 * softmax[t, e] / total)
    found.nan_to_num(0).square().sum().backward()
    assert gate.projection.weight.grad.isfinite().all() and gate.projection.weight.grad.abs().max() > 0


def test_nothing_is_replayed_without_a_recording():
    with pytest.raises(ValueError, match="needs a recording"):
        routed(ReplayGate(H, E), vectors(2))
