"""Runs `moesys bench layer` at the shapes of published models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from moesys.measure.gpu_check import models
from moesys.measure.gpu_check.rows import CheckTask, Row, tried
from moesys.measure.layer_benchmark import one_device, other_systems
from moesys.measure.layer_benchmark.layer_times import LEAST_SHARE, SHAPES, LayerShape


def run(task: CheckTask) -> Iterator[Row]:
    """A row for each shape."""
    for name in models.LAYERS:
        shape = shrunken(SHAPES[name]) if task.dry else SHAPES[name]
        what = f"{name}: T={shape.tokens} H={shape.hidden} F={shape.ffn_hidden} E={shape.experts} k={shape.top_k}"
        yield tried(_row, task, what, shape)
    if task.dry:
        yield Row("rates in bfloat16", "not run", "they need a GPU; the shapes above are shrunken, and float32")


def shrunken(shape: LayerShape) -> LayerShape:
    """A shape that a CPU computes at once."""
    few = replace(shape, experts=min(shape.experts, 8), top_k=min(shape.top_k, 4))
    return replace(few, tokens=32, hidden=16, ffn_hidden=8)


def _row(task: CheckTask, what: str, shape: LayerShape) -> Row:
    dtype = torch.float32 if task.dry else torch.bfloat16
    others = other_systems.found()
    result = one_device.run(shape, dtype, torch.device(task.device), 1 if task.dry else None, others)
    print("\n".join(result.lines()), flush=True)
    ms = result.milliseconds
    figures = {
        "share_of_product": round(result.share, 4),
        "peak_bytes": result.peak_bytes,
        "kept_bytes": result.kept_bytes,
        "rounds": result.rounds,
        **{f"{side}_ms": round(value, 3) for side, value in ms.items()},
        **{name: round(value, 4) for name, value in result.ratios.items()},
        **{f"{side}_tflops": round(value, 2) for side, value in result.teraflops.items()},
    }
    if task.dry:
        return Row(what, "passed", f"runs beside {', '.join(side for side in ms if side != 'layer')}", figures)
    said = f"layer {ms['layer']:.3g} ms, {result.teraflops['layer']:.3g} TFLOP/s, "
    said += f"{result.share:.2f} of a dense product's"
    said += f" (aim {LEAST_SHARE:.2f}: {'met' if result.share >= LEAST_SHARE else 'missed'})"
    said += "".join(f"; {name} {value:.2f}" for name, value in result.ratios.items())
    said += "".join(f"; {side} left out, too little memory" for side in result.left_out)
    if not any(side.startswith("transformers") for side in (*ms, *result.left_out)):
        said += f"; {others.missing}"
    return Row(what, "passed", said, figures)
