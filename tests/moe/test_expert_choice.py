"""Expert choice against the paper's definition, and its causal variant against what it promises."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch
from gate_cases import assert_same_gradients, drawn, feed_forward, layer, passed, routed, vectors
from parts import together

from moesys.moe import Tokens
from moesys.moe.gates.expert_choice import CausalExpertChoiceGate, ExpertChoiceGate
from moesys.moe.routing import MicroBatch

H, E, K = 16, 6, 2


def best_tokens(scores: torch.Tensor, factor: float, k: int = K) -> list[set[int]]:
    """Per expert, its tokens: one expert at a time."""
    tokens, experts = scores.shape
    limit = min(tokens, ceil(factor * tokens * k / experts))
    return [set(sorted(range(tokens), key=lambda t: -scores[t, e].item())[:limit]) for e in range(experts)]


@pytest.mark.parametrize(("tokens", "factor"), [(24, 1.0), (24, 1.5), (7, 1.0), (3, 0.4), (1, 1.0), (5, 10.0)])
def test_each_expert_takes_its_best_tokens(tokens, factor):
    built = layer(ExpertChoiceGate(H, E, K, factor, z_loss=0.01))
    x, target = vectors(tokens), vectors(tokens, seed=2)
    out = built(x[None])[0]
    logits = x @ built.gate.projection.weight.T
    scores = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = torch.zeros_like(x)
    for e, taken in enumerate(best_tokens(scores, factor)):
        for t in taken:
            expected[t] = expected[t] + scores[t, e] * feed_forward(built.experts, e, x[t])
    torch.testing.assert_close(out, expected)
    z = 0.01 * logits.exp().sum(-1).log().square().mean()
    assert_same_gradients(built, (out * target).sum(), (expected * target).sum() + z)
    limit = min(tokens, ceil(factor * tokens * K / E))
    assert built.statistics.take()["load"].tolist() == [limit] * E


def test_a_micro_batch_in_parts_is_chosen_from_as_a_whole():
    gate, x = drawn(ExpertChoiceGate(H, E, K)), vectors(24)
    whole = routed(gate, x)
    # Two parts as context parallelism deals them: first and last quarter, and the middle.
    parts = [torch.cat([torch.arange(6), torch.arange(18, 24)]), torch.arange(6, 18)]
    found = together(2, lambda n, scope: routed(gate, x[parts[n]], Tokens(parts[n]), scope))
    torch.testing.assert_close(torch.cat(found), whole[torch.cat(parts)], equal_nan=True)


def test_of_tokens_that_are_alike_the_earliest_are_taken():
    gate = drawn(ExpertChoiceGate(H, E, 1))
    x = vectors(1).expand(12, H) * (1 + 1e-9 * torch.randn(12, 1, dtype=torch.float64))
    number = torch.randperm(12)
    taken = ~routed(gate, x, Tokens(number)).isnan()
    assert torch.equal(taken, (number < 2)[:, None].expand(12, E))


def causal(threshold: list[float] | None = None, k: int = K, factor: float = 1.0) -> CausalExpertChoiceGate:
    gate = drawn(CausalExpertChoiceGate(H, E, k, factor, bins=128))
    gate.reset_state()
    if threshold is not None:
        gate.threshold_E.copy_(torch.tensor(threshold))
    return gate


def test_before_the_first_step_tokens_take_their_best_experts():
    gate, x = causal(), vectors(9)
    scores = (x @ gate.projection.weight.T).softmax(-1)
    found = routed(gate, x)
    assert torch.equal((~found.isnan()).sum(1), torch.full((9,), K))
    torch.testing.assert_close(found.nan_to_num(0).sort(1).values[:, -K:], scores.sort(1).values[:, -K:])


def test_then_experts_take_what_passes_their_threshold_whatever_follows():
    gate, x = causal([0.1, 0.2, 0.05, 0.9, 0.0, 0.3]), vectors(9)
    scores = (x @ gate.projection.weight.T).softmax(-1)
    found = routed(gate, x)
    passed = scores > torch.tensor([0.1, 0.2, 0.05, 0.9, 0.0, 0.3])
    assert torch.equal(~found.isnan(), passed)
    torch.testing.assert_close(found[passed], scores[passed])
    # The first tokens' routing is the same without the others.
    torch.testing.assert_close(routed(gate, x[:4]), found[:4], equal_nan=True)


def test_thresholds_follow_the_quantile_of_the_global_batch():
    k, factor = 2, 0.75
    gate = causal(k=k, factor=factor)
    batches = [vectors(3000, seed) for seed in (3, 4)]
    for x in batches:  # two micro-batches of one step
        passed(gate, x, Tokens(torch.arange(len(x))))
    statistics = gate.step_statistics()
    assert statistics.sum() == 6000 * E
    gate.after_step(statistics.double())
    scores = (torch.cat(batches) @ gate.projection.weight.T).softmax(-1).detach().numpy()
    wanted = np.quantile(scores, 1 - factor * k / E, axis=0)
    # A bin is 9 % wide; inside it the logarithm is taken as uniform.
    np.testing.assert_allclose(gate.threshold_E.numpy(), wanted, rtol=0.03)
    share = (scores > gate.threshold_E.numpy()).mean(0)
    np.testing.assert_allclose(share, factor * k / E, atol=0.01)

    first = gate.threshold_E.clone()
    passed(gate, 2 * batches[0], Tokens(torch.arange(3000)))
    gate.after_step(gate.step_statistics().double())
    scores = (2 * batches[0] @ gate.projection.weight.T).softmax(-1).detach().numpy()
    target = np.quantile(scores, 1 - factor * k / E, axis=0)
    moved = np.log(gate.threshold_E.numpy() / first.numpy())
    np.testing.assert_allclose(moved, 0.1 * np.log(target / first.numpy()), atol=0.004)


def test_evaluation_counts_nothing():
    gate = causal().eval()
    passed(gate, vectors(5), Tokens(torch.arange(5)))
    assert gate.step_statistics().abs().max() == 0


def test_every_token_passes_if_every_expert_is_wanted():
    gate = causal(k=E)
    passed(gate, vectors(50), Tokens(torch.arange(50)))
    gate.after_step(gate.step_statistics().double())
    assert not routed(gate, vectors(50)).isnan().any()


def test_thresholds_stay_float32_and_begin_by_themselves():
    gate = CausalExpertChoiceGate(H, E, 2, bins=128)
    assert (gate.threshold_E == -1).all()
    gate.threshold_E.fill_(0.123456789)
    gate.to(torch.bfloat16)
    assert gate.threshold_E.dtype == torch.float32 and gate.threshold_E[0].item() == pytest.approx(0.123456789)


def test_evaluation_has_no_losses():
    gate = drawn(ExpertChoiceGate(H, E, 2, z_loss=0.1))
    for training, names in ((True, {"z"}), (False, set())):
        output = gate.train(training)(vectors(8), Tokens(torch.arange(8)), MicroBatch())
        assert set(output.losses) == names
