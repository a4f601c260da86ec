"""What one MoE layer costs beside its arithmetic: forward and backward, everything in one interleaved run.

moesys bench layer
moesys bench layer --shape qwen3-30b-a3b --dtype bfloat16
moesys bench layer --ranks 2
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from moesys.kernels.expert_ffn import expert_ffn
from moesys.kernels.permute import permute, sort_by_expert, unpermute
from moesys.measure import checkout
from moesys.measure.interleaved_timing import Step, alone, interleave, ratio
from moesys.measure.peak_memory import peak_bytes
from moesys.models.layers import FeedForward
from moesys.moe import MoELayer, Routing, Tokens
from moesys.moe.experts import Experts
from moesys.moe.gates import TopKGate
from moesys.words import plural


@dataclass(frozen=True)
class LayerShape:
    """T tokens of size H, E experts of inner size F, k of them per token."""

    tokens: int
    hidden: int
    ffn_hidden: int
    experts: int
    top_k: int

    @property
    def flops(self) -> int:
        """Of the experts' products, forward and backward."""
        return 18 * self.tokens * self.top_k * self.hidden * self.ffn_hidden

    def kept_bytes(self, size: int) -> int:
        """What must be kept for backward: tokens and first products of `size` bytes per element, routing."""
        products = 2 * self.tokens * self.top_k * self.ffn_hidden
        routing = self.tokens * (4 * self.experts + self.top_k * (4 + 8 + 8))
        return size * (self.tokens * self.hidden + products) + routing


SHAPES = {
    "laptop": LayerShape(4096, 512, 1024, 16, 2),
    "two-ranks": LayerShape(1024, 256, 512, 8, 2),
    "mixtral-8x7b": LayerShape(8192, 4096, 14336, 8, 2),
    "qwen3-30b-a3b": LayerShape(32768, 2048, 768, 128, 8),
    "deepseek-v3": LayerShape(8192, 7168, 2048, 256, 8),
}


TARGETS = {"layer / dense": 1.10, "layer / transformers grouped_mm": 0.95, "peak / kept memory": 1.3}
"""Most that the project allows itself at the laptop's shape on two cores."""

PUBLISHED = tuple(SHAPES[name] for name in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"))

LEAST_SHARE = 0.85
"""Of a dense product's rate: what the layer is to reach on a GPU at the published shapes."""


@dataclass(frozen=True)
class LayerTimes:
    """Median milliseconds of every side, medians of the rounds' ratios, and memory.

    `left_out`: sides for which the device has too little memory. `on_gpu`: whether it is one.
    """

    shape: LayerShape
    dtype: str
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    teraflops: dict[str, float]
    peak_bytes: int
    kept_bytes: int
    rounds: int
    device: str
    on_gpu: bool = False
    left_out: tuple[str, ...] = ()
    date: str = field(default_factory=lambda: date.today().isoformat())

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The result as text."""
        s = self.shape
        title = f"T={s.tokens} H={s.hidden} F={s.ffn_hidden} E={s.experts} k={s.top_k}, {self.dtype}"
        lines = [f"{title}, forward and backward, medians of {self.rounds} interleaved rounds"]
        lines += [f"  {name:<26} {ms:>9.2f} ms" for name, ms in self.milliseconds.items()]
        lines += [f"  {name:<26} left out: the device has too little memory for it" for name in self.left_out]
        for name, value in self.ratios.items():
            target = TARGETS.get(name) if s == SHAPES["laptop"] else None
            said = "" if target is None else f"  target {target:.2f}: {'met' if value <= target else 'MISSED'}"
            lines.append(f"  {name:<32} {value:>6.2f}{said}")
        flops = ", ".join(f"{name} {value:.3g}" for name, value in self.teraflops.items())
        lines.append(f"  TFLOP/s: {flops}; the layer has {self.share:.0%} of the dense product's rate{self._said()}")
        lines.append(f"  memory: {self.peak_bytes / 1e6:.1f} MB at most, {self.kept_bytes / 1e6:.1f} MB must be kept")
        return lines

    @property
    def share(self) -> float:
        """The layer's rate as part of a dense product's."""
        return self.teraflops["layer"] / self.teraflops["product"]

    def _said(self) -> str:
        """Of the share: whether it is what the project wants."""
        if not self.on_gpu or self.shape not in PUBLISHED:
            return ""
        return f"  target {LEAST_SHARE:.0%}: {'met' if self.share >= LEAST_SHARE else 'MISSED'}"


def run(shape: LayerShape, dtype: torch.dtype, device: torch.device, rounds: int | None) -> LayerTimes:
    """Time the layer beside a dense feed-forward, a dense product, transformers' block, and its own parts.

    On CPU the layer gathers and sums inside its experts: the parts "permute" and "unpermute" are what that
    would cost alone. Peak memory is what `peak_bytes` finds without the weights' gradients, the input included;
    on CPU it holds one expert's intermediate results for each core. What does not fit the device beside the
    layer and the dense product is left out.

    Raises:
        torch.OutOfMemoryError: these two themselves do not fit.
    """
    torch.manual_seed(0)
    layer = build(shape, dtype, device)
    x = torch.randn(1, shape.tokens, shape.hidden, device=device, dtype=dtype)
    grad = torch.randn_like(x)
    sides: dict[str, Step] = {
        "layer": both(layer, x, grad),
        "dense": both(dense(shape, dtype, device), x, grad),
        "product": product(shape, dtype, device),
        **{f"transformers {name}": both(block, x, grad) for name, block in transformers_blocks(layer, shape).items()},
        **parts(layer, shape, x[0]),
    }
    name = str(dtype).removeprefix("torch.")
    optional = sides.keys() - {"layer", "product"}
    seconds = interleave(sides, rounds, alone(device), what=f"timing in {name}", optional=optional)
    medians = {side: median(values) for side, values in seconds.items()}
    others = [side for side in medians if side in ("dense", "product") or side.startswith("transformers")]
    weights = sum(p.nbytes for p in layer.parameters())
    peak = peak_bytes(both(layer, x, grad), device) - weights + x.nbytes
    kept = shape.kept_bytes(x.element_size())
    return LayerTimes(
        shape=shape,
        dtype=name,
        milliseconds={side: 1e3 * value for side, value in medians.items()},
        ratios={f"layer / {side}": ratio(seconds, "layer", side) for side in others}
        | {"peak / kept memory": peak / kept},
        teraflops={
            side: shape.flops / medians[side] / 1e12 for side in ("layer", "dense", "product") if side in medians
        },
        peak_bytes=peak,
        kept_bytes=kept,
        rounds=len(seconds["layer"]),
        device=describe(device),
        on_gpu=device.type == "cuda",
        left_out=tuple(side for side in sides if side not in medians),
    )


def describe(device: torch.device) -> str:
    """The device and torch's version, in words."""
    cpu = f"{platform.machine()}, {plural(os.cpu_count() or 1, 'core')}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{name}, torch {torch.__version__}"


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
    """Inside, modules are made on the device and in the type at once, not on the host in float32."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)


def both(module: nn.Module, x: Tensor, grad: Tensor) -> Step:
    """One forward and backward pass of `module`, with respect to its input and its weights."""

    def step() -> None:
        given = x.detach().requires_grad_()
        try:
            # As in a model, whose next layer consumes the output: nothing holds it during backward.
            edge = get_gradient_edge(module(given))
            torch.autograd.backward(edge, grad)
        finally:  # also where memory ended
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


def transformers_blocks(layer: MoELayer, shape: LayerShape) -> dict[str, nn.Module]:
    """transformers' Mixtral block with the layer's weights, by each of its implementations; empty without it.

    They share the one block, whose experts' weights are copies in its own layout, or views of the layer's
    where memory is scarce: on a GPU of which these are more than a sixth, as their gradients are again.
    """
    try:
        with checkout.hidden():
            from transformers import MixtralConfig
            from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return {}
    options: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn_hidden,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
    }
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(MixtralConfig(**options))
    fc1, fc2 = layer.experts.get_parameter("fc1").detach(), layer.experts.get_parameter("fc2").detach()
    theirs = fc1.flatten(2).mT, fc2.mT
    if not scarce(fc1.nbytes + fc2.nbytes, fc1.device):
        theirs = theirs[0].contiguous(), theirs[1].contiguous()
    block.experts.gate_up_proj, block.experts.down_proj = map(nn.Parameter, theirs)
    block.gate.weight = nn.Parameter(layer.gate.get_parameter("projection.weight").detach())
    return {way: _By(way, block) for way in ("eager", "grouped_mm")}


def scarce(weights: int, device: torch.device) -> bool:
    """Whether so many bytes of weights are too many to have twice."""
    return device.type == "cuda" and 6 * weights > torch.cuda.mem_get_info(device)[1]


class _By(nn.Module):
    """A block of transformers whose experts run by one of its implementations."""

    def __init__(self, way: str, block: Any):
        super().__init__()
        self.way, self.block = way, block

    def forward(self, x: Tensor) -> Tensor:
        self.block.experts.config._experts_implementation = self.way
        return self.block(x)


def parts(layer: MoELayer, shape: LayerShape, x_TH: Tensor) -> dict[str, Step]:
    """Forward and backward of each part of the layer alone, on what the layer would give it."""
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
