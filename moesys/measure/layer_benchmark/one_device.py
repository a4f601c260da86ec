"""What one MoE layer costs beside its arithmetic: forward and backward, everything in one interleaved run.

moesys bench layer
moesys bench layer --shape qwen3-30b-a3b --dtype bfloat16
moesys bench layer --ranks 2
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import date
from statistics import median

import torch

from moesys.measure.interleaved_timing import Step, alone, interleave, ratio
from moesys.measure.layer_benchmark.other_systems import NONE, OtherSystems
from moesys.measure.layer_benchmark.shape import PUBLISHED, SHAPES, LayerShape
from moesys.measure.layer_benchmark.sides import both, build, dense, parts, product
from moesys.measure.peak_memory import peak_bytes
from moesys.words import plural

TARGETS = {"layer / dense": 1.10, "layer / transformers grouped_mm": 0.95, "peak / kept memory": 1.3}
"""Most that the project allows itself at the laptop's shape on two cores."""

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


def run(
    shape: LayerShape, dtype: torch.dtype, device: torch.device, rounds: int | None, others: OtherSystems = NONE
) -> LayerTimes:
    """Time the layer beside a dense feed-forward, a dense product, other systems' layers, and its own parts.

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
    theirs = others.on_one_device(layer, shape)
    sides: dict[str, Step] = {
        "layer": both(layer, x, grad),
        "dense": both(dense(shape, dtype, device), x, grad),
        "product": product(shape, dtype, device),
        **{name: both(block, x, grad) for name, block in theirs.items()},
        **parts(layer, shape, x[0]),
    }
    name = str(dtype).removeprefix("torch.")
    optional = sides.keys() - {"layer", "product"}
    seconds = interleave(sides, rounds, alone(device), what=f"timing in {name}", optional=optional)
    medians = {side: median(values) for side, values in seconds.items()}
    compared = [side for side in medians if side in ("dense", "product", *theirs)]
    weights = sum(p.nbytes for p in layer.parameters())
    peak = peak_bytes(both(layer, x, grad), device) - weights + x.nbytes
    kept = shape.kept_bytes(x.element_size())
    return LayerTimes(
        shape=shape,
        dtype=name,
        milliseconds={side: 1e3 * value for side, value in medians.items()},
        ratios={f"layer / {side}": ratio(seconds, "layer", side) for side in compared}
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
