"""Losses against their formulas in float64, on one device and on parts of a micro-batch."""

from __future__ import annotations

from math import erf, sqrt

import pytest
import torch
from gate_cases import passed
from parts import together
from torch import Tensor

from moesys.moe import Tokens, noise
from moesys.moe.gates import TopKGate
from moesys.moe.gates.top_k import Groups, Randomness
from moesys.moe.losses import Balance
from moesys.moe.routing import MicroBatch

S, L, H, E, K = 4, 6, 8, 6, 2
T = S * L
NUMBER = torch.arange(T)


def build(balance: Balance, **options) -> TopKGate:
    torch.manual_seed(0)
    gate = TopKGate(H, E, K, balance=balance, **options).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return gate


X = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def probabilities(gate: TopKGate, x: Tensor) -> Tensor:
    logits = x @ gate.projection.weight.T
    if gate.score == "sigmoid":
        scores = 1 / (1 + torch.exp(-logits))
        return scores / scores.sum(1, keepdim=True)
    return logits.exp() / logits.exp().sum(1, keepdim=True)


def chosen(gate: TopKGate, x: Tensor, plain: bool = False) -> Tensor:
    """Each token's experts, best first; `plain`: without bias and groups."""
    scores = probabilities(gate, x) if gate.score == "softmax" else torch.sigmoid(x @ gate.projection.weight.T)
    if not plain and gate.bias_rate:
        scores = scores + gate.selection_bias
    if not plain and gate.groups is not None:
        parts = scores.view(len(x), gate.groups.count, -1)
        best = parts.sort(-1, descending=True).values[..., :2].sum(-1).sort(-1, descending=True).indices
        for t in range(len(x)):
            for lost in best[t, gate.groups.kept :]:
                parts[t, lost] = -1e9
    return scores.sort(-1, descending=True).indices[:, :K]


def balance(p: Tensor, expert: Tensor, f: Tensor | None = None) -> Tensor:
    f = torch.bincount(expert.flatten(), minlength=E).double() / expert.numel() if f is None else f
    return E * sum(f[e] * p[:, e].mean() for e in range(E))


def variation(v: Tensor) -> Tensor:
    return ((v - v.mean()) ** 2).mean() / v.mean() ** 2


def counted(gate: TopKGate, counts: str) -> Tensor:
    """The experts whose shares are in balance losses."""
    return chosen(gate, X)[:, :1] if counts == "first" else chosen(gate, X, plain=counts == "scores")


def expected(name: str, gate: TopKGate) -> Tensor:
    """The loss by its formula, over the whole micro-batch."""
    p, expert = probabilities(gate, X), counted(gate, gate.counts)
    if name == "balance":
        return balance(p, expert)
    if name == "sequence_balance":
        return torch.stack([balance(p[s * L : s * L + L], expert[s * L : s * L + L]) for s in range(S)]).mean()
    if name == "z":
        return torch.stack([torch.log((X[t] @ gate.projection.weight.T).exp().sum()) ** 2 for t in range(T)]).mean()
    assert name == "importance"
    weights = p.gather(1, expert)
    weights = weights / weights.sum(1, keepdim=True)
    return variation(torch.stack([(weights * (expert == e)).sum() for e in range(E)]))


NAMES = ("balance", "sequence_balance", "z", "importance")
GATES = {
    "softmax": {},
    "sigmoid": {"score": "sigmoid"},
    "biased groups": {"score": "sigmoid", "bias_rate": 0.1, "groups": Groups(3, 2, "top2")},
}


@pytest.mark.parametrize("counts", ["scores", "first"])
@pytest.mark.parametrize("name", ["balance", "sequence_balance"])
def test_what_others_count(name, counts):
    """DeepSeek-V3's and Megatron-Core's plain scores, GShard's and DeepSpeed's first choices."""
    gate = build(Balance(**{name: 0.3}), **GATES["biased groups"], counts=counts)
    gate.selection_bias.normal_(std=0.4)
    (found,) = gate(X, Tokens(NUMBER, sequences=S), MicroBatch()).losses.values()
    loss = 0.3 * expected(name, gate)
    torch.testing.assert_close(found, loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient(found, gate), gradient(loss, gate), rtol=1e-9, atol=1e-12)
    gate.counts = "chosen"
    assert abs(loss / (0.3 * expected(name, gate)) - 1) > 1e-3


def test_the_bias_follows_what_was_chosen_whatever_the_losses_count():
    gate = build(Balance(global_balance=0.3), **GATES["biased groups"], counts="first")
    gate.selection_bias.normal_(std=0.4)
    with torch.no_grad():
        passed(gate, X, Tokens(NUMBER))
    load, first = (torch.bincount(e.flatten(), minlength=E) for e in (chosen(gate, X), counted(gate, "first")))
    assert torch.equal(gate.step_statistics(), torch.cat([load, first]))
    gate.before_step(gate.step_statistics().double())
    (found,) = passed(gate, X, Tokens(NUMBER)).losses.values()
    torch.testing.assert_close(found, 0.3 * balance(probabilities(gate, X), counted(gate, "first")))
    before = gate.selection_bias.clone()
    gate.after_step(gate.step_statistics().double())
    torch.testing.assert_close(gate.selection_bias - before, 0.1 * torch.sign(load.double().mean() - load))


def gradient(loss: Tensor, gate: TopKGate) -> Tensor:
    return torch.autograd.grad(loss, gate.projection.weight, retain_graph=True)[0]


@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_those_of_the_formula(name, options):
    gate = build(Balance(**{name: 0.3}), **options)
    if gate.bias_rate:
        gate.selection_bias.normal_(std=0.2)
    found = gate(X, Tokens(NUMBER, sequences=S), MicroBatch()).losses
    assert set(found) == {name}
    loss = 0.3 * expected(name, gate)
    torch.testing.assert_close(found[name], loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient(found[name], gate), gradient(loss, gate), rtol=1e-9, atol=1e-12)


ALL = Balance(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def shares(part: int, scope: MicroBatch, gate: TopKGate) -> dict[str, Tensor]:
    """Of one half of each sequence."""
    rows = NUMBER.view(S, 2, L // 2)[:, part].flatten()
    return gate(X[rows], Tokens(NUMBER[rows], sequences=S), scope).losses


def test_shares_of_parts_sum_to_the_loss():
    gate = build(ALL, randomness=Randomness(gaussian=True))
    whole = gate(X, Tokens(NUMBER, sequences=S), MicroBatch()).losses
    assert set(whole) == {"balance", "sequence_balance", "global_balance", "z", "importance", "load_loss"}
    parts = together(2, lambda n, scope: shares(n, scope, gate))
    for name, loss in whole.items():
        total = parts[0][name] + parts[1][name]
        torch.testing.assert_close(total, loss, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(gradient(total, gate), gradient(loss, gate), rtol=1e-9, atol=1e-12)


def test_smooth_load_is_the_chance_to_be_chosen_again():
    gate = build(Balance(load_loss=0.7), randomness=Randomness(gaussian=True, layer=3))
    found = gate(X, Tokens(NUMBER), MicroBatch()).losses["load_loss"]
    clean = X @ gate.projection.weight.T
    width = torch.log(1 + torch.exp(X @ gate.noise.weight.T))
    noisy = clean + noise.normal(NUMBER, E, noise.key(3, "noise")).double() * width
    load = [torch.zeros((), dtype=torch.float64) for _ in range(E)]
    chances = torch.zeros(T, E)
    for t in range(T):
        for e in range(E):
            others = [noisy[t, o] for o in range(E) if o != e]
            threshold = sorted(others, key=lambda v: -v.item())[K - 1]
            z = (clean[t, e] - threshold) / width[t, e]
            load[e] = load[e] + 0.5 * (1 + torch.erf(z / sqrt(2)))
            chances[t, e] = 0.5 * (1 + erf(z.item() / sqrt(2)))
    loss = 0.7 * variation(torch.stack(load))
    torch.testing.assert_close(found, loss, rtol=1e-10, atol=1e-12)
    for parameter in (gate.projection.weight, gate.noise.weight):
        expected = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
        torch.testing.assert_close(
            torch.autograd.grad(found, parameter, retain_graph=True)[0], expected, rtol=1e-8, atol=1e-11
        )
    # In expectation over the noise, as many choices as there are.
    assert chances.sum().item() == pytest.approx(T * K, rel=0.15)


def test_noise_of_no_width_has_finite_gradients():
    gate = build(Balance(load_loss=0.7), randomness=Randomness(gaussian=True))
    torch.nn.init.zeros_(gate.noise.weight)
    gate.noise.weight.data[:, 0] = -2000.0
    x = X.clone()
    x[:, 0] = 1.0
    found = gate(x, Tokens(NUMBER), MicroBatch()).losses["load_loss"]
    for part in torch.autograd.grad(found, list(gate.parameters())):
        assert part.isfinite().all()


@pytest.mark.parametrize("counted", [False, True])
def test_global_balance_knows_every_micro_batch(counted):
    """Two micro-batches of one step: ranks that run at once, or one after another with a pass to count first."""
    gate = build(Balance(global_balance=0.3))
    halves = X.chunk(2)
    if counted:
        with torch.no_grad():
            for half in halves:
                passed(gate, half, Tokens(NUMBER[: T // 2]))
        gate.before_step(gate.step_statistics().double())
        losses = [passed(gate, half, Tokens(NUMBER[: T // 2])).losses for half in halves]
    else:

        class Ranks(MicroBatch):
            def sum_global(self, x: Tensor) -> Tensor:
                return torch.bincount(chosen(build(Balance()), X).flatten(), minlength=E)

        losses = [gate(half, Tokens(NUMBER[: T // 2]), Ranks()).losses for half in halves]
    f = torch.bincount(chosen(build(Balance()), X).flatten(), minlength=E).double() / (T * K)
    loss = 0.3 * balance(probabilities(gate, X), chosen(build(Balance()), X), f)
    found = (losses[0]["global_balance"] + losses[1]["global_balance"]) / 2
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(gradient(found, gate), gradient(loss, gate))
    if counted:
        assert gate.counts_first
        gate.after_step(gate.step_statistics().double())
        assert gate.global_load is None and gate.load is None


def test_evaluation_has_no_losses():
    gate = build(ALL, randomness=Randomness(gaussian=True)).eval()
    assert gate(X, Tokens(NUMBER, sequences=S), MicroBatch()).losses == {}
