"""Times one MoE layer beside its arithmetic: forward and backward, all sides interleaved.

moesys bench layer
moesys bench layer --shape qwen3-30b-a3b --dtype bfloat16
moesys bench layer --ranks 2
"""

from __future__ import annotations

import os
import platform
from statistics import median

import torch

from moesys.measure.interleaved_timing import Step, alone, interleave, ratio
from moesys.measure.layer_benchmark.layer_times import LayerShape, LayerTimes
from moesys.measure.layer_benchmark.other_systems import NONE, OtherSystems
from moesys.measure.layer_benchmark.sides import both, build, dense, parts, product
from moesys.measure.peak_memory import peak_bytes
from moesys.words import plural


def run(
    shape: LayerShape, dtype: torch.dtype, device: torch.device, rounds: int | None, others: OtherSystems = NONE
) -> LayerTimes:
    """Time the layer beside a dense feed-forward, a dense product, other systems' layers, and its own parts.

    On CPU the layer gathers and sums inside its experts: the parts "permute" and "unpermute" are what these cost alone.
    Peak memory is `peak_bytes` without the weights' gradients, with the input; on CPU it holds one expert's
    intermediate results for each core. Sides that do not fit the device beside the layer and the dense product are
    left out.

    Raises:
        torch.OutOfMemoryError: the layer or the dense product does not fit.
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
