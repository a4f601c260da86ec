"""The MoE layer against a loop over tokens in float64, written from the definitions."""

from math import ceil

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesys.models.layers import FeedForward
from moesys.moe import MoELayer, Tokens
from moesys.moe.capacity import Capacity
from moesys.moe.experts import Experts
from moesys.moe.gates import TopKGate
from moesys.moe.gates.expert_choice import CausalExpertChoiceGate
from moesys.moe.losses import Balance
from moesys.moe.shared import ConditionalMix

T, H, F, E, K = 24, 16, 12, 6, 2


def build(capacity: Capacity | None = None, balance: Balance | None = None, normalize: bool = True) -> MoELayer:
    torch.manual_seed(0)
    gate = TopKGate(H, E, K, normalize=normalize, capacity=capacity, balance=balance)
    layer = MoELayer(gate, Experts(E, H, F)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def reference(
    layer: MoELayer, x: Tensor, factor: float | None, policy: str, normalize: bool
) -> tuple[Tensor, Tensor, int]:
    """(output [T, H], load-balancing plus z loss, dropped), one assignment at a time."""
    gate, experts = layer.gate, layer.experts
    logits = x @ gate.projection.weight.T
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assignments = []
    for t in range(T):
        chosen = sorted(range(E), key=lambda e: -probabilities[t, e].item())[:K]
        total = sum(probabilities[t, e] for e in chosen) if normalize else 1.0
        assignments += [(t, slot, e, probabilities[t, e] / total) for slot, e in enumerate(chosen)]
    f = [sum(a[2] == e for a in assignments) / (T * K) for e in range(E)]
    balance = E * sum(f[e] * probabilities[:, e].mean() for e in range(E))
    z = torch.stack([torch.log(logits[t].exp().sum()) ** 2 for t in range(T)]).mean()
    kept = assignments
    if factor is not None:
        kept = []
        for e in range(E):
            mine = [a for a in assignments if a[2] == e]
            mine.sort(key=lambda a: (-a[3].item() if policy == "weight" else 0, a[0], a[1]))
            kept += mine[: ceil(factor * T * K / E)]
    out = torch.zeros_like(x)
    for t, _, e, weight in kept:
        gated, up = x[t] @ experts.fc1[e, :, 0], x[t] @ experts.fc1[e, :, 1]
        out[t] = out[t] + weight * ((gated / (1 + (-gated).exp()) * up) @ experts.fc2[e])
    return out, 0.02 * balance + 0.003 * z, len(assignments) - len(kept)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("factor", "policy"), [(None, "weight"), (0.5, "weight"), (0.5, "position"), (1.0, "weight")])
def test_layer_equals_a_loop_over_tokens(factor, policy, normalize):
    layer = build(Capacity(factor, drop=policy), Balance(balance=0.02, z=0.003), normalize)
    x = torch.randn(2, T // 2, H, dtype=torch.float64, requires_grad=True)
    target = torch.randn(T, H, dtype=torch.float64)
    out = layer(x)
    (out.view(T, H) * target).sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": x.grad.clone()}
    totals = layer.statistics.take()

    layer.zero_grad()
    x.grad = None
    expected, loss, dropped = reference(layer, x.view(T, H), factor, policy, normalize)
    # The auxiliary losses enter backward although the layer returns its output alone.
    ((expected * target).sum() + loss).backward()
    torch.testing.assert_close(out.view(T, H), expected, rtol=1e-10, atol=1e-12)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["x"], x.grad, rtol=1e-9, atol=1e-12)
    assert totals["dropped"].item() == dropped
    assert (dropped > 0) == (factor is not None)
    torch.testing.assert_close((totals["balance"] + totals["z"]).double(), loss, rtol=1e-6, atol=0)


def test_balance_loss_is_its_coefficient_when_routing_is_uniform():
    layer = build(balance=Balance(balance=0.5))
    torch.nn.init.zeros_(layer.gate.projection.weight)
    layer(torch.randn(1, T, H, dtype=torch.float64))
    # With equal probabilities P_e = 1/E whatever is chosen, so the loss is α · Σ f_e = α.
    assert layer.statistics.take()["balance"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_experts_without_tokens_get_zero_gradients(tokens):
    layer = build()
    torch.nn.init.zeros_(layer.gate.projection.weight)
    layer.gate.projection.weight.data[3] = 1.0
    layer.gate.projection.weight.data[1] = 0.5
    x = torch.rand(1, tokens, H, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.statistics.take()["load"].tolist() == [0, tokens, 0, tokens, 0, 0]
    for weight in layer.experts.parameters():
        assert weight.grad[[0, 2, 4, 5]].abs().max() == 0
        assert weight.grad[[1, 3]].abs().min() > 0


def test_routing_is_float32_in_a_bfloat16_model():
    layer = build().to(torch.bfloat16)
    x = torch.randn(1, T, H, dtype=torch.bfloat16)
    routing = layer.gate(x[0], Tokens(torch.arange(T)), layer.scope)
    logits = x[0].float() @ layer.gate.projection.weight.float().T
    expected = logits.softmax(-1).topk(K).values
    torch.testing.assert_close(routing.weight_A.view(T, K), expected / expected.sum(-1, keepdim=True))
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["top_k", "causal"])
def test_a_recomputed_pass_counts_once(kind, reentrant):
    torch.manual_seed(0)
    shared, mix = FeedForward(H, F), ConditionalMix(H, 0.8, 0.1)
    if kind == "top_k":
        balance = Balance(balance=0.02, global_balance=0.01, z=0.003)
        gate = TopKGate(H, E, K, bias_rate=0.1, capacity=Capacity(0.5), balance=balance)
    else:
        gate = CausalExpertChoiceGate(H, E, K, z_loss=0.003, bins=128)
    layer = MoELayer(gate, Experts(E, H, F), shared, mix=mix)
    x = torch.randn(2, T // 2, H, requires_grad=True)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        for _ in range(2):
            run(x).sum().backward()
        found.append((layer.statistics.take(), gate.step_statistics()))
        gate.load = None
    (plain, seen), (again, seen_again) = found
    assert plain["calls"] == 2 and plain["load"].sum() == 2 * T * K
    assert plain.keys() == again.keys() and {"z", "cmr"} <= plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value)
    assert torch.equal(seen, seen_again)
