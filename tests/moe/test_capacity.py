"""Who is dropped, by each rule written out one assignment at a time; and shapes that do not depend on it."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from parts import together
from torch import Tensor

from moesys.moe import MoELayer, Tokens
from moesys.moe.capacity import Capacity, capacity
from moesys.moe.experts import Experts
from moesys.moe.gates import TopKGate
from moesys.moe.gates.top_k import Randomness
from moesys.moe.routing import MicroBatch, Routing

T, H, E, K = 20, 8, 5, 2
X = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
NUMBER = torch.randperm(100, generator=torch.Generator().manual_seed(4))[:T].sort().values
RULES = ("weight", "position", "choice", "priority")


def build(capacity: Capacity | None = None, normalize: bool = True, **options) -> TopKGate:
    torch.manual_seed(0)
    gate = TopKGate(H, E, K, normalize=normalize, capacity=capacity, **options).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    gate.projection.weight.data[0] += 0.4
    return gate


def table(routing: Routing, rows: int = T) -> Tensor:
    whole = torch.zeros(rows, E, dtype=torch.float64)
    return whole.index_put((routing.token_A, routing.expert_A), routing.weight_A, accumulate=True)


def by_hand(rule: str, limit: int, normalize: bool) -> tuple[set[tuple[int, int]], int]:
    """(token, expert) of every assignment that stays, and how many do not."""
    p = (X @ build().projection.weight.T).softmax(-1)
    queue = []
    for t in range(T):
        for choice, e in enumerate(sorted(range(E), key=lambda e: -p[t, e].item())[:K]):
            total = p[t].topk(K).values.sum() if normalize else 1.0
            queue.append((t, choice, e, (p[t, e] / total).item(), p[t].max().item()))
    order = {
        "weight": lambda a: (-a[3], a[0], a[1]),
        "position": lambda a: (a[0], a[1]),
        "choice": lambda a: (a[1], a[0]),
        "priority": lambda a: (a[1], -a[4], a[0]),
    }
    taken, stays = [0] * E, set()
    for t, _, e, *_ in sorted(queue, key=order[rule]):
        if taken[e] < limit:
            taken[e] += 1
            stays.add((t, e))
    return stays, len(queue) - len(stays)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("factor", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_the_rule_says_who_stays(rule, factor, normalize):
    routing = build(Capacity(factor, drop=rule), normalize)(X, Tokens(NUMBER), MicroBatch())
    stays, dropped = by_hand(rule, ceil(factor * T * K / E), normalize)
    assert set(zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True)) == stays
    assert routing.dropped == dropped > 0
    whole = table(build(normalize=normalize)(X, Tokens(NUMBER), MicroBatch()))
    found = table(routing)
    assert torch.equal(found[found > 0], whole[found > 0])


def test_rules_differ():
    kept = {rule: frozenset(by_hand(rule, 5, False)[0]) for rule in RULES}
    assert len(set(kept.values())) == len(RULES)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_parts_of_a_micro_batch_decide_together(rule, pad):
    gate = build(Capacity(0.6, drop=rule, pad=pad))
    alone = gate(X, Tokens(NUMBER), MicroBatch())
    rows = torch.arange(T).view(2, 2, T // 4)[:, [1, 0]].flatten(1)  # each part holds pieces, the later ones first
    parts = together(2, lambda n, scope: gate(X[rows[n]], Tokens(NUMBER[rows[n]]), scope))
    whole = torch.zeros(T, E, dtype=torch.float64)
    for n, part in enumerate(parts):
        whole[rows[n]] = table(part, T // 2)
    assert torch.equal(whole, table(alone))
    assert sum(part.dropped for part in parts) == alone.dropped


@pytest.mark.parametrize("options", [{}, {"randomness": Randomness(second=True)}], ids=str)
@pytest.mark.parametrize("factor", [0.25, 1.0, 5.0])
def test_padding_changes_shapes_and_nothing_else(factor, options):
    def run(pad: bool) -> tuple[Tensor, Routing, dict[str, Tensor]]:
        gate = build(Capacity(factor, pad=pad), **options)
        layer = MoELayer(gate, Experts(E, H, 4).double())
        torch.manual_seed(1)
        for weight in layer.experts.parameters():
            torch.nn.init.normal_(weight)
        x = X.clone().requires_grad_()
        number = torch.stack([NUMBER, NUMBER], -1)[None]
        out = layer(x[None], number)
        (out * torch.arange(H)).sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
        return out, layer.gate(X, Tokens(NUMBER), MicroBatch()), gradients

    plain, padded = run(False), run(True)
    torch.testing.assert_close(padded[0], plain[0])
    for name, gradient in plain[2].items():
        torch.testing.assert_close(padded[2][name], gradient, msg=name)
    routing = padded[1]
    limit = min(ceil(factor * T * K / E), T)
    assert routing.expert_A.bincount(minlength=E).tolist() == [limit] * E
    assert (routing.token_A.diff() >= 0).all() and routing.token_A.max() < T
    assert routing.dropped == plain[1].dropped
    assert torch.equal(routing.load_E, plain[1].load_E)
    assert torch.equal(table(routing), table(plain[1]))


def test_padded_shapes_do_not_depend_on_the_data():
    """With fake tensors nothing has a value, so every step whose shape needs one fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        gate = TopKGate(H, E, K, capacity=Capacity(0.5, drop="priority", pad=True), bias_rate=0.1)
        routing = gate(torch.randn(T, H), Tokens(torch.arange(T)), MicroBatch())
        assert routing.token_A.shape == routing.weight_A.shape == (ceil(0.5 * T * K / E) * E,)


def test_evaluation_has_a_factor_of_its_own():
    gate = build(Capacity(0.3, eval_factor=0.5))
    limits = []
    for training in (True, False):
        limits.append(gate.train(training)(X, Tokens(NUMBER), MicroBatch()).expert_A.bincount().max().item())
    assert limits == [ceil(0.3 * T * K / E), ceil(0.5 * T * K / E)]
    gate = build(Capacity(0.3)).eval()
    assert gate(X, Tokens(NUMBER), MicroBatch()).expert_A.bincount().max() == limits[0]
    dropless = build(Capacity(0.3, eval_factor=E / K)).eval()
    assert dropless(X, Tokens(NUMBER), MicroBatch()).dropped == 0


@pytest.mark.parametrize(("minimum", "limit"), [(0, 1), (3, 3), (50, T)])
def test_a_capacity_has_a_minimum_and_never_exceeds_the_tokens(minimum, limit):
    assert Capacity(0.01, minimum=minimum).limit(True, T, K, E) == limit


def test_a_second_choice_that_is_not_wanted_takes_nobodys_place():
    gate = build(Capacity(0.5, drop="position"), randomness=Randomness(second=True))
    routing = gate(X, Tokens(NUMBER), MicroBatch())
    free = build(randomness=Randomness(second=True))(X, Tokens(NUMBER), MicroBatch())
    stays = []
    for e in range(E):
        rows = free.token_A[free.expert_A == e].tolist()
        stays += [(t, e) for t in rows[: ceil(0.5 * T * K / E)]]
    assert set(zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True)) == set(stays)
    assert routing.dropped == len(free.token_A) - len(stays)


@pytest.mark.parametrize(("factor", "tokens", "top_k", "experts", "places"), [
    (1.1, 100, 1, 10, 11), (2.2, 100, 1, 20, 11), (1.1, 101, 1, 10, 12), (1.25, 4096, 2, 64, 160), (0.001, 8, 1, 8, 1),
])  # fmt: skip
def test_a_capacity_is_that_of_decimal_numbers(factor, tokens, top_k, experts, places):
    assert capacity(factor, tokens, top_k, experts) == places
