"""Token choice against a loop over tokens in float64, written from the papers' formulas."""

from __future__ import annotations

from math import exp

import pytest
import torch
from gate_cases import passed
from torch import Tensor

from moesys.moe import Tokens, noise
from moesys.moe.capacity import Capacity
from moesys.moe.gates import PrototypeGate, TopKGate
from moesys.moe.gates.cosine import CosineProjection
from moesys.moe.gates.top_k import Groups, Randomness
from moesys.moe.routing import MicroBatch
from moesys.moe.zero import ZeroRule

T, H, E = 24, 16, 12
NUMBER = torch.arange(T) * 3 + 1000


def tokens() -> Tensor:
    return torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(gate_type: type[TopKGate] = TopKGate, top_k: int = 2, **options) -> TopKGate:
    torch.manual_seed(0)
    gate = gate_type(H, E, top_k, **options).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return gate


def table(gate: TopKGate, x: Tensor) -> Tensor:
    """What the gate decides, as weights [T, E]."""
    routing = gate(x, Tokens(NUMBER), MicroBatch())
    assert (routing.token_A.diff() >= 0).all() and routing.dropped == 0
    whole = torch.zeros(T, E, dtype=routing.weight_A.dtype)
    return whole.index_put((routing.token_A, routing.expert_A), routing.weight_A, accumulate=True)


def by_hand(
    logits: list[float],
    k: int,
    score: str,
    normalize: bool,
    scale: float,
    bias: list[float] | None = None,
    groups: Groups | None = None,
) -> list[float]:
    """One token's weights [E]."""
    if score == "softmax":
        total = sum(exp(x) for x in logits)
        scores = [exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + exp(-x)) for x in logits]
    selection = [s + b for s, b in zip(scores, bias or [0.0] * E, strict=True)]
    allowed = set(range(E))
    if groups is not None:
        size = E // groups.count
        parts = [range(g * size, (g + 1) * size) for g in range(groups.count)]
        best = {"max": lambda p: max(selection[e] for e in p)}
        best["top2"] = lambda p: sum(sorted((selection[e] for e in p), reverse=True)[:2])
        ranked = sorted(parts, key=best[groups.score], reverse=True)
        allowed = {e for part in ranked[: groups.kept] for e in part}
    chosen = sorted(allowed, key=lambda e: -selection[e])[:k]
    share = sum(scores[e] for e in chosen) if normalize else 1.0
    return [scale * scores[e] / share if e in chosen else 0.0 for e in range(E)]


@pytest.mark.parametrize("groups", [None, Groups(4, 2, "max"), Groups(3, 2, "top2")], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("score", "normalize", "scale"), [("softmax", False, 1.0), ("sigmoid", True, 2.5)])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_weights_are_those_of_the_formula(score, normalize, scale, groups, biased, top_k):
    gate = build(top_k=top_k, score=score, normalize=normalize, scale=scale, groups=groups, bias_rate=0.1 * biased)
    bias = None
    if biased:
        gate.selection_bias.normal_(std=0.3)
        bias = gate.selection_bias.tolist()
    x = tokens()
    logits = (x @ gate.projection.weight.T).tolist()
    expected = [by_hand(row, top_k, score, normalize, scale, bias, groups) for row in logits]
    torch.testing.assert_close(table(gate, x), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_normalized_softmax_is_the_softmax_over_the_chosen():
    gate = build(top_k=3)
    x = tokens()
    best = (x @ gate.projection.weight.T).topk(3)
    expected = torch.zeros(T, E, dtype=torch.float64).scatter(1, best.indices, best.values.softmax(-1))
    torch.testing.assert_close(table(gate, x), expected)


def test_gradients_are_those_of_the_formula():
    groups = Groups(4, 2, "top2")
    gate = build(score="sigmoid", groups=groups, bias_rate=0.1, scale=2.0)
    gate.selection_bias.normal_(std=0.3)
    x, target = tokens().requires_grad_(), torch.randn(T, E, dtype=torch.float64)
    (table(gate, x) * target).sum().backward()
    found = x.grad.clone(), gate.projection.weight.grad.clone()
    x.grad = gate.projection.weight.grad = None
    chosen = table(gate, x).detach() > 0
    scores = 1 / (1 + torch.exp(-(x @ gate.projection.weight.T))) * chosen
    (2.0 * scores / scores.sum(1, keepdim=True) * target).sum().backward()
    torch.testing.assert_close(found, (x.grad, gate.projection.weight.grad), rtol=1e-10, atol=1e-12)


def test_of_equals_the_first_experts_and_groups_are_chosen():
    for options in ({}, {"bias_rate": 0.1}, {"groups": Groups(4, 2)}):
        gate = build(top_k=3, **options)
        torch.nn.init.zeros_(gate.projection.weight)
        assert (table(gate, tokens())[:, :3] > 0).all()


def test_gaussian_noise_has_a_learned_width():
    gate = build(top_k=3, randomness=Randomness(gaussian=True, layer=4))
    x = tokens()
    z = noise.normal(NUMBER, E, noise.key(4, "noise")).double()
    width = torch.log(1 + torch.exp(x @ gate.noise.weight.T))
    noisy = x @ gate.projection.weight.T + z * width
    expected = [by_hand(row, 3, "softmax", True, 1.0) for row in noisy.tolist()]
    found = table(gate, x)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    target = torch.randn(T, E, dtype=torch.float64)
    (found * target).sum().backward()
    kept = torch.where(found.detach() > 0, noisy, -torch.inf)
    wanted = torch.autograd.grad((kept.softmax(1) * target).sum(), [gate.projection.weight, gate.noise.weight])
    torch.testing.assert_close((gate.projection.weight.grad, gate.noise.weight.grad), wanted, rtol=1e-9, atol=1e-12)
    clean = build(top_k=3)
    clean.projection.weight.data = gate.projection.weight.data
    assert torch.equal(table(gate.eval(), x), table(clean, x))


def test_jitter_multiplies_what_the_gate_sees():
    gate = build(randomness=Randomness(jitter=0.3, layer=2))
    x = tokens()
    factor = 1 + 0.3 * (2 * noise.uniform(NUMBER, H, noise.key(2, "jitter")).double() - 1)
    shaken = table(gate, x)
    plain = table(gate.eval(), x)
    assert not torch.equal(shaken, plain)
    torch.testing.assert_close(shaken, table(gate, x * factor), rtol=1e-6, atol=1e-8)


def test_the_second_of_two_stays_by_chance():
    gate = build(randomness=Randomness(second=True, layer=1))
    x = tokens()
    whole = table(gate.eval(), x)
    second = whole.topk(2).values[:, 1]
    drawn = noise.uniform(NUMBER, 1, noise.key(1, "second"))[:, 0]
    gone = drawn >= 2 * second
    assert 0 < gone.sum() < T
    found = table(gate.train(), x)
    # The first one's weight stays what it was beside the second.
    assert torch.equal(found.amax(1), whole.amax(1))
    assert torch.equal((found > 0).sum(1), 2 - gone.long())


def test_a_second_that_does_not_stay_is_nowhere_counted():
    """Neither in the loads that the bias follows and metrics show, nor among zero-computation experts."""
    rule = ZeroRule(true=E - 4, count=4)
    gate = TopKGate(
        H, E - 4, 2, randomness=Randomness(second=True, layer=1), zero=rule, bias_rate=0.1, capacity=Capacity(0.8)
    )
    gate = gate.double()
    torch.nn.init.normal_(gate.projection.weight, std=0.4)
    x = tokens()
    first, second = (x @ gate.projection.weight.T).topk(2).indices.unbind(1)
    share = (x @ gate.projection.weight.T).topk(2).values.softmax(1)[:, 1]
    stays = noise.uniform(NUMBER, 1, noise.key(1, "second"))[:, 0] < 2 * share
    load = torch.bincount(torch.cat([first, second[stays]]), minlength=E)
    assert not stays.all() and (second[~stays] >= E - 4).any()
    routing = passed(gate, x, Tokens(NUMBER))
    assert torch.equal(gate.step_statistics(), load) and torch.equal(routing.load_E, load[: E - 4])
    assert routing.zero_load == load[E - 4 :].sum()
    assert (routing.zero_TZ > 0).sum() == load[E - 4 :].sum()
    assert len(routing.token_A) == routing.load_E.sum() - routing.dropped and routing.dropped > 0


@pytest.mark.parametrize("logit", [200.0, -200.0])
def test_weights_of_experts_far_below_the_best_sum_to_one(logit):
    """In float32 their softmax over all experts is 0."""
    gate = TopKGate(1, 4, 2)
    gate.projection.weight.data = torch.tensor([[logit], [0.0], [-1.0], [0.0]])
    gate.forced = lambda seen: torch.tensor([[1, 2]])
    weight = gate(torch.ones(1, 1), Tokens(torch.zeros(1)), MicroBatch()).weight_A
    torch.testing.assert_close(weight, torch.tensor([0.0, -1.0]).softmax(0))


def test_the_bias_weighs_zero_computation_experts_as_the_losses_do():
    """Null experts need not be balanced among themselves."""
    gate = TopKGate(H, 4, 2, bias_rate=0.1, zero=ZeroRule(4, 2, "adamoe"))
    gate.after_step(torch.tensor([5.0, 3, 4, 4, 7, 1]))
    torch.testing.assert_close(gate.selection_bias, torch.tensor([-0.1, 0.1, 0, 0, 0, 0]))


def test_cosines_do_not_see_lengths():
    gate = build(projection=CosineProjection(H, E, 4))
    x = tokens()
    down, experts, temperature = (p.detach() for p in gate.projection.parameters())
    logits = torch.empty(T, E, dtype=torch.float64)
    for t in range(T):
        low = down @ x[t]
        for e in range(E):
            logits[t, e] = (low @ experts[e]) / (low.norm() * experts[e].norm()) / temperature.exp().item()
    expected = [by_hand(row, 2, "softmax", True, 1.0) for row in logits.tolist()]
    torch.testing.assert_close(table(gate, x), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(table(gate, 7 * x), table(gate, x))
    table(gate, x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in gate.parameters())


def test_the_temperature_starts_at_its_value():
    assert CosineProjection(H, E, 4).log_temperature.exp().item() == pytest.approx(0.3)


@pytest.mark.parametrize("normalize", [False, True])
def test_prototypes_are_gates_of_their_own(normalize):
    gate = build(PrototypeGate, top_k=3, normalize=normalize, scale=2.0)
    x = tokens()
    logits = (x @ gate.projection.weight.T).tolist()
    expected = []
    for row in logits:
        weights = [0.0] * E
        for first in range(0, E, 4):
            part = row[first : first + 4]
            weights[first + part.index(max(part))] = exp(max(part)) / sum(exp(v) for v in part)
        total = sum(weights) if normalize else 1.0
        expected.append([2.0 * w / total for w in weights])
    torch.testing.assert_close(table(gate, x), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_follows_the_load_of_the_step(score):
    gate = build(bias_rate=0.05, score=score)
    gate.reset_state()
    for _ in range(3):
        passed(gate, tokens(), Tokens(NUMBER))
    load = torch.bincount((tokens() @ gate.projection.weight.T).topk(2).indices.flatten(), minlength=E)
    assert torch.equal(gate.step_statistics(), 3 * load)
    gate.after_step(gate.step_statistics().double())
    expected = [0.05 * ((load.sum() / E > n).item() - (load.sum() / E < n).item()) for n in load]
    torch.testing.assert_close(gate.selection_bias, torch.tensor(expected, dtype=torch.float64))
    # A new step starts from nothing, and evaluation counts nothing.
    assert gate.step_statistics() is None
    passed(gate.eval(), tokens(), Tokens(NUMBER))
    assert gate.step_statistics() is None


def test_the_bias_stays_float32():
    gate = TopKGate(H, E, 2, bias_rate=0.001)
    gate.selection_bias.fill_(1.001)
    gate.to(torch.bfloat16)
    assert gate.selection_bias.dtype == torch.float32 and gate.selection_bias[0].item() == pytest.approx(1.001)
    assert gate.projection.weight.dtype == torch.bfloat16
    assert gate.double().selection_bias.dtype == torch.float64
    assert [name for name, _ in gate.state_dict_buffers()] == ["selection_bias"]
    with torch.device("meta"):
        gate = TopKGate(H, E, 2, bias_rate=0.001).to(torch.bfloat16)
    gate.to_empty(device="cpu").reset_state()
    assert gate.selection_bias.dtype == torch.float32 and gate.selection_bias.abs().max() == 0


def test_forced_experts_keep_the_gates_own_weights():
    for gate in (build(), build(PrototypeGate)):
        gate.forced = lambda seen: torch.stack([seen.number_T % E, (seen.number_T + 5) % E], -1)
        found = table(gate, tokens())
        assert torch.equal((found > 0).nonzero()[:, 1].view(T, 2), gate.forced(Tokens(NUMBER)).sort(1).values)
        torch.testing.assert_close(found.sum(1), torch.ones(T, dtype=torch.float64))
