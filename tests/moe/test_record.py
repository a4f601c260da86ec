"""Recording from outside: what a layer routed, each token once."""

from __future__ import annotations

import pytest
import torch
from gate_cases import H, layer, vectors
from torch.utils.checkpoint import checkpoint

from moesys.moe import Tokens
from moesys.moe.capacity import Capacity
from moesys.moe.gates import TopKGate
from moesys.moe.gates.expert_choice import ExpertChoiceGate
from moesys.moe.gates.soft import SoftGate
from moesys.moe.record import RoutingRecorder

E = 6


def marked(numbers: torch.Tensor) -> torch.Tensor:
    return torch.stack([numbers, torch.zeros_like(numbers)], -1)[None]


@pytest.mark.parametrize(
    "gate",
    [
        TopKGate(H, E, 3),
        TopKGate(H, E, 3, capacity=Capacity(0.7)),
        TopKGate(H, E, 3, capacity=Capacity(0.7, pad=True)),
        ExpertChoiceGate(H, E, 2),
    ],
    ids=["dropless", "dropping", "padded", "expert choice"],
)
def test_what_was_routed_is_what_was_recorded(gate):
    built = layer(gate)
    recorder = RoutingRecorder({"a": built})
    x, number = vectors(20), torch.arange(20) + 40
    # Two micro-batches, the later tokens first, and recomputed in backward.
    for part in (slice(10, 20), slice(0, 10)):
        given = x[None, part].clone().requires_grad_()
        checkpoint(built, given, marked(number[part]), use_reentrant=False).sum().backward()
    built.eval()
    built(x[None], marked(number + 1000))
    built.train()
    found = recorder.take()["a"]
    recorder.close()
    built(x[None], marked(number))
    assert recorder.take() == {}
    assert torch.equal(found.number_T, number)
    assert found.expert_TK.dtype == torch.int16 and found.weight_TK.dtype == torch.float16
    for part in (slice(0, 10), slice(10, 20)):
        routing = gate(x[part], Tokens(number[part]), built.scope)
        table = torch.zeros(10, E, dtype=torch.float64).index_put(
            (routing.token_A, routing.expert_A), routing.weight_A.detach(), accumulate=True
        )
        expert, weight = found.expert_TK[part].long(), found.weight_TK[part].double()
        there = expert >= 0
        assert (weight[~there] == 0).all()
        again = torch.zeros(10, E, dtype=torch.float64).scatter_add(1, expert.clamp(min=0), weight)
        torch.testing.assert_close(again, table, rtol=1e-3, atol=1e-4)
        assert there.sum() == (table > 0).sum()


def test_what_sends_no_token_anywhere_is_not_recorded():
    built = layer(SoftGate(H, E, 2))
    recorder = RoutingRecorder({"a": built})
    built(vectors(4)[None])
    assert recorder.take() == {}
