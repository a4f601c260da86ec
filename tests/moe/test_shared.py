"""Shared experts and how they join the routed ones, against the papers' formulas in float64."""

import re

import pytest
import torch
from torch import Tensor

from moesys.config import Config
from moesys.config.schema import MoEConfig
from moesys.models.moe import build_moe
from moesys.moe import MoELayer
from moesys.moe.routing import MicroBatch
from moesys.moe.shared import ConditionalMix
from moesys.parallel import dimension

H, F, E, T = 12, 10, 4, 14


def build(**keys) -> MoELayer:
    torch.manual_seed(0)
    raw = {"experts": E, "top_k": 2, "ffn_hidden": F, "balance_loss": 0.0, "shared_experts": 2, **keys}
    layer = build_moe(MoEConfig.model_validate(raw), H, 0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def dense(layer: MoELayer, x: Tensor) -> Tensor:
    """SwiGLU by its formula."""
    gate, up, down = (getattr(layer.shared, f"{name}_proj").weight for name in ("gate", "up", "down"))
    g = x @ gate.T
    return (g / (1 + (-g).exp()) * (x @ up.T)) @ down.T


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def expected(kind: str, layer: MoELayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """(output, loss) by the paper of each mix."""
    routed = MoELayer(layer.gate, layer.experts)(x)
    shared, none = dense(layer, x), torch.zeros(())
    if kind == "add":
        return routed + shared, none
    w = layer.mix.projection.weight
    if kind == "gate":
        return routed + sigmoid(x @ w[0])[..., None] * shared, none
    logits = x @ w.T + layer.mix.projection.bias
    if kind == "residual":
        c = logits.exp() / logits.exp().sum(-1, keepdim=True)
        return c[..., :1] * routed + c[..., 1:] * shared, none
    g = sigmoid(logits)
    return g * routed + (1 - g) * shared, 0.3 * (g.mean() - 0.7).abs()


@pytest.mark.parametrize("kind", ["add", "gate", "residual", "cmr"])
def test_output_and_gradients(kind):
    layer = build(shared_mix=kind, cmr_budget=0.7, cmr_loss=0.3)
    x = torch.randn(2, T // 2, H, dtype=torch.float64, requires_grad=True)
    target = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    out = layer(x)
    found = torch.autograd.grad((out * target).sum(), inputs)
    told = layer.statistics.take()
    wanted, loss = expected(kind, layer, x)
    # The loss enters backward although the layer returns its output alone.
    gradients = torch.autograd.grad((wanted * target).sum() + loss, inputs)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert ("cmr" in told) == (kind == "cmr")
    if kind == "cmr":
        assert told["cmr"].item() == pytest.approx(loss.item())


@pytest.mark.parametrize("activation", ["geglu", "clipped_swiglu", "gelu", "relu", "relu2"])
def test_shared_experts_have_the_activation_of_the_routed_ones(activation):
    layer = build(activation=activation, experts=1, top_k=1, shared_experts=1)
    with torch.no_grad():  # the routed expert and the shared one become the same
        if layer.experts.fc1.shape[2] == 2:
            layer.shared.gate_proj.weight.copy_(layer.experts.fc1[0, :, 0].T)
        layer.shared.up_proj.weight.copy_(layer.experts.fc1[0, :, -1].T)
        layer.shared.down_proj.weight.copy_(layer.experts.fc2[0].T)
    x = torch.randn(1, T, H, dtype=torch.float64)
    torch.testing.assert_close(layer(x), 2 * layer.shared(x), rtol=1e-10, atol=1e-12)


class Half(MicroBatch):
    """One of two devices with half of the tokens each, that knows of the other's."""

    size = 2

    def __init__(self, other: Tensor):
        self.other = other

    def sum(self, x: Tensor) -> Tensor:
        return x + self.other


def test_the_shares_of_a_spread_micro_batch_add_up_to_its_loss():
    mix = ConditionalMix(H, budget=0.5, loss=0.3).double()
    torch.nn.init.normal_(mix.projection.weight)
    torch.nn.init.constant_(mix.projection.bias, 0.4)
    x = torch.randn(T, H, dtype=torch.float64)
    whole = mix(x, MicroBatch()).losses["cmr"]
    halves = x.chunk(2)
    excess = [sigmoid(h @ mix.projection.weight.T + mix.projection.bias).mean() - 0.5 for h in halves]
    shares = [mix(h, Half(excess[1 - i].detach())).losses["cmr"] for i, h in enumerate(halves)]
    torch.testing.assert_close(sum(shares), whole)
    weight = mix.projection.weight
    torch.testing.assert_close(torch.autograd.grad(sum(shares), weight), torch.autograd.grad(whole, weight))


@pytest.mark.parametrize("kind", ["gate", "residual", "cmr"])
def test_mixing_is_float32_in_a_bfloat16_model(kind):
    layer = build(shared_mix=kind).to(torch.bfloat16)
    x = torch.randn(1, T, H, dtype=torch.bfloat16)
    assert layer.mix(x[0], layer.scope).dense_T1.dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("keys", "key", "rule"),
    [
        ({"shared_mix": "gate"}, "shared_mix", "gate needs shared experts, and model.moe.shared_experts is 0"),
        ({"shared_ffn_hidden": 8}, "shared_ffn_hidden", r"\(8\) has no meaning: model.moe.shared_experts is 0"),
        ({"shared_experts": 1, "cmr_budget": 0.5}, "cmr_budget", r"\(0.5\) belongs to shared_mix: cmr"),
        ({"shared_experts": 1, "cmr_loss": 1.0}, "cmr_loss", r"\(1.0\) belongs to shared_mix: cmr"),
    ],
)
def test_keys_without_meaning_are_refused(keys, key, rule):
    model = {"hidden": 64, "layers": 1, "moe": {"experts": 4, "ffn_hidden": 8, **keys}}
    (problem,) = dimension.check(Config.model_validate({"model": model}))
    assert problem.key == f"model.moe.{key}"

    assert re.search(rule, problem.rule)
