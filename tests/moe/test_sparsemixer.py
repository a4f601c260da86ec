"""SparseMixer in training: what it draws, and what a draw's weight and gradient are. Evaluation is compared with
transformers' in tests/models/test_transformers_blocks.py."""

from __future__ import annotations

import torch

from moesys.moe.gates.sparsemixer import SparseMixerGate
from moesys.moe.routing import Tokens

E, T, THRESHOLD = 4, 20_000, 0.4


def chosen(training: bool, logits_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights [T, 2] of tokens that all have the same logits."""
    gate = SparseMixerGate(8, E, 2, threshold=THRESHOLD).train(training)
    result = gate.choose(logits_E.expand(T, E), Tokens(torch.arange(T)))
    return result.expert_Tk, result.weight_Tk


def test_experts_near_the_best_are_drawn_by_their_softmax_and_others_never():
    logits = torch.tensor([2.0, 1.5, 1.0, -3.0], dtype=torch.float64)
    expert_T2, _ = chosen(True, logits)
    first = expert_T2[:, 0].bincount(minlength=E) / T
    # (2 − 1) / 2 is within twice the threshold, and (2 + 3) / 3 is not.
    torch.testing.assert_close(first[:3], logits[:3].softmax(0).float(), atol=0.02, rtol=0)
    assert first[3] == 0
    assert (expert_T2[:, 0] != expert_T2[:, 1]).all()
    torch.testing.assert_close(expert_T2, chosen(True, logits)[0])  # the same for the same tokens
    evaluated = chosen(False, logits)[0]
    assert (evaluated == torch.tensor([0, 1])).all()


def test_a_drawn_experts_weight_counts_a_third_mostly_and_its_gradient_in_full():
    logits = torch.tensor([1.2, 1.0, 0.9, -9.0], dtype=torch.float64, requires_grad=True)
    expert_T2, weight_T2 = chosen(True, logits)
    share = logits.detach()[:3].softmax(0)
    for expert in range(3):
        weights = weight_T2[expert_T2[:, 0] == expert, 0].detach() / share[expert]
        if expert == 0:
            torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-4, atol=0)
            continue
        third = weights < 0.5
        torch.testing.assert_close(weights[third], torch.full_like(weights[third], 0.3333), rtol=1e-4, atol=0)
        assert abs(third.double().mean() - 0.75) < 0.02
    (found,) = torch.autograd.grad(weight_T2[expert_T2[:, 0] == 2, 0][0], logits)
    one = logits.detach().requires_grad_()
    (expected,) = torch.autograd.grad(one[:3].softmax(0)[2], one)
    torch.testing.assert_close(found, expected)
