"""What the tests of gates share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from moesys.moe import MoELayer, Routing, Tokens
from moesys.moe.experts import Experts
from moesys.moe.gates import Gate
from moesys.moe.routing import GateOutput, MicroBatch

H, F = 16, 12
M = TypeVar("M", bound=nn.Module)


def drawn(module: M, std: float = 0.5, seed: int = 0) -> M:
    """The module in float64, its parameters drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return module


def layer(gate: Gate, activation: str = "swiglu", bias: bool = False) -> MoELayer:
    """An MoE layer around the gate, in float64."""
    return drawn(MoELayer(gate, Experts(gate.experts, H, F, activation, bias)))


def vectors(tokens: int, seed: int = 1, hidden: int = H) -> Tensor:
    """Tokens [T, H], float64."""
    return torch.randn(tokens, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def passed(gate: Gate, x_TH: Tensor, tokens: Tokens, scope: MicroBatch | None = None) -> GateOutput:
    """What the gate decides, which it counts as in a layer's pass."""
    output = gate(x_TH, tokens, scope or MicroBatch())
    if output.counted is not None:
        gate.count(output.counted)
    return output


def routed(gate: Gate, x_TH: Tensor, tokens: Tokens | None = None, scope: MicroBatch | None = None) -> Tensor:
    """The gate's weights as a table [T, E]; NaN where it does not route."""
    tokens = tokens or Tokens(torch.arange(len(x_TH)))
    output = gate(x_TH, tokens, scope or MicroBatch())
    assert isinstance(output, Routing) and output.load_E is not None
    assert (output.token_A.diff() >= 0).all()
    table = torch.full((len(x_TH), gate.experts), torch.nan, dtype=output.weight_A.dtype)
    assert torch.equal(output.load_E, output.expert_A.bincount(minlength=gate.experts))
    return table.index_put((output.token_A, output.expert_A), output.weight_A)


def feed_forward(experts: Experts, e: int, x: Tensor) -> Tensor:
    """SwiGLU of expert e, written out."""
    gated, up = x @ experts.fc1[e, :, 0], x @ experts.fc1[e, :, 1]
    return (gated / (1 + (-gated).exp()) * up) @ experts.fc2[e]


def gradients(module: nn.Module, *losses: Tensor) -> list[dict[str, Tensor]]:
    """Of each scalar, with respect to every parameter."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    return [
        dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True), strict=True))
        for loss in losses
    ]


def assert_same_gradients(module: nn.Module, found: Tensor, expected: Tensor) -> None:
    """Of two scalars."""
    ours, theirs = gradients(module, found, expected)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12, msg=name)
