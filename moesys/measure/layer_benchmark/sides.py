"""The sides of the benchmark of one MoE layer: the layer, its parts, dense products, and transformers' block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from moesys.kernels.expert_ffn import expert_ffn
from moesys.kernels.permute import permute, sort_by_expert, unpermute
from moesys.measure.interleaved_timing import Step
from moesys.measure.layer_benchmark.layer_times import LayerShape
from moesys.models.layers import FeedForward
from moesys.moe import MoELayer, Routing, Tokens
from moesys.moe.experts import Experts
from moesys.moe.gates import TopKGate


def build(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> MoELayer:
    """Our layer: top-k softmax gate, dropless, SwiGLU experts, no auxiliary losses."""
    with made_on(device, dtype):
        gate = TopKGate(shape.hidden, shape.experts, shape.top_k)
        layer = MoELayer(gate, Experts(shape.experts, shape.hidden, shape.ffn_hidden)).to(device, dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def dense(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A dense feed-forward of the same arithmetic: inner size k · F."""
    with made_on(device, dtype):
        return FeedForward(shape.hidden, shape.top_k * shape.ffn_hidden).to(device, dtype)


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """A context in which modules are made on the device and in the type at once, not on the host in float32."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)


def both(module: nn.Module, x: Tensor, grad: Tensor) -> Step:
    """One forward and backward pass of `module`, for its input x [1, T, H] and its weights. `grad`: of the output."""

    def step() -> None:
        leaf = x.detach().requires_grad_()
        try:
            # In a model the next layer consumes the output, and nothing holds it during backward.
            edge = get_gradient_edge(module(leaf))
            torch.autograd.backward(edge, grad)
        finally:  # also when memory runs out
            for parameter in module.parameters():
                parameter.grad = None

    return step


def product(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> Step:
    """The experts' multiply-adds as three square-ish products of dense matrices."""
    rows = shape.tokens * shape.top_k
    a = torch.randn(rows, shape.hidden, device=device, dtype=dtype)
    b = torch.randn(shape.hidden, 3 * shape.ffn_hidden, device=device, dtype=dtype)
    out = torch.empty(rows, 3 * shape.ffn_hidden, device=device, dtype=dtype)

    def step() -> None:
        for _ in range(3):
            torch.mm(a, b, out=out)

    return step


def parts(layer: MoELayer, shape: LayerShape, x_TH: Tensor) -> dict[str, Step]:
    """Forward and backward of each part of the layer alone, on the input that the layer would give it. x_TH: [T, H]."""
    tokens = Tokens(torch.arange(shape.tokens, device=x_TH.device))
    routing = layer.gate(x_TH, tokens, layer.scope)
    assert isinstance(routing, Routing)
    weight = routing.weight_A.detach()
    p = sort_by_expert(routing.token_A, routing.expert_A, shape.tokens, shape.experts)
    rows = permute(x_TH, p).detach()
    fc1, fc2, kind = layer.experts.get_parameter("fc1"), layer.experts.get_parameter("fc2"), layer.experts.activation

    def gate(x: Tensor) -> Tensor:
        return layer.gate(x, tokens, layer.scope).weight_A

    def encode(x: Tensor) -> Tensor:
        return permute(x, sort_by_expert(routing.token_A, routing.expert_A, shape.tokens, shape.experts))

    def experts(x: Tensor) -> Tensor:
        return expert_ffn(x, fc1, fc2, p.counts_E, kind, weight)

    def decode(x: Tensor) -> Tensor:
        return unpermute(x, p)

    inputs: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "gate": (gate, x_TH),
        "permute": (encode, x_TH),
        "experts": (experts, rows),
        "unpermute": (decode, rows),
    }
    return {f"part {name}": _alone(function, x, layer) for name, (function, x) in inputs.items()}


def _alone(function: Callable[[Tensor], Tensor], x: Tensor, layer: MoELayer) -> Step:
    with torch.no_grad():
        grad = torch.randn_like(function(x))

    def step() -> None:
        try:
            function(x.detach().requires_grad_()).backward(grad)
        finally:
            for parameter in layer.parameters():
                parameter.grad = None

    return step
