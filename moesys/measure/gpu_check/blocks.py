"""Checks one decoder block of published models, forward and backward, compiled and not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moesys.measure.gpu_check import models
from moesys.measure.gpu_check.rows import CheckTask, Row, tried
from moesys.measure.interleaved_timing import alone
from moesys.measure.layer_benchmark.sides import made_on
from moesys.models.block import Block
from moesys.models.rotary import rotary_angles
from moesys.parallel.recompute import prepare
from moesys.words import plural

TOKENS, FEW = 4096, 16
"""Tokens of the sequence, and of a dry run's sequence."""

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest relative change of results by compilation. In bfloat16 a few tokens choose other experts."""


def run(task: CheckTask) -> Iterator[Row]:
    """A row for each model."""
    # A dry run skips the first, which is like the second.
    for name in models.BLOCKS[1:] if task.dry else models.BLOCKS:
        section = models.sections()[name]
        yield tried(_row, task, name, section)
        gc.collect()
        if not task.dry:
            torch.cuda.empty_cache()
    if task.dry:
        yield Row("Inductor's kernels", "not run", "they need a GPU; above, graphs are made and run by aot_eager")


class GraphCounter:
    """A backend of torch.compile that counts its graphs, and passes them on."""

    def __init__(self, backend: str):
        self.count = 0
        self.compile = torch._dynamo.lookup_backend(backend)  # as torch's guide to backends does

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return self.compile(graph, inputs)


def _row(task: CheckTask, name: str, section: dict[str, Any]) -> Row:
    device = torch.device(task.device)
    dtype = torch.float32 if task.dry else torch.bfloat16
    config = models.config(models.shrunken(section) if task.dry else section)
    with made_on(device, dtype):
        block = Block(config, 0).to(dtype)
    for parameter in block.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    tokens = FEW if task.dry else TOKENS
    step = _step(block, config, tokens, device, dtype)
    plain, plain_ms = step(), _milliseconds(step, device, task)
    torch._dynamo.utils.counters.clear()
    graphs = GraphCounter("aot_eager" if task.dry else "inductor")
    prepare(block, "none", True, graphs)
    compiled, compiled_ms = step(), _milliseconds(step, device, task)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    change = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(compiled, plain, strict=True))
    figures = {"graphs": graphs.count, "breaks": breaks, "change": change, "tokens": tokens}
    times = {"plain_ms": round(plain_ms, 3), "compiled_ms": round(compiled_ms, 3)}
    said = f"{plural(graphs.count, 'graph')}, {plural(breaks, 'break')}; "
    said += f"{plain_ms:.3g} ms, compiled {compiled_ms:.3g} ms"
    said += f"; compilation changes results by {change:.1e} of them"
    wrong = [f"more than {CLOSE[dtype]:.0e}"] if not change <= CLOSE[dtype] else []
    wrong += ["nothing was compiled"] if not graphs.count else []
    wrong += ["parts of it ran as they are"] if breaks else []
    return Row(name, "failed" if wrong else "passed", "; ".join([said, *wrong]), figures | times)


def _step(
    block: Block, config: Any, tokens: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], list[Tensor]]:
    """One pass of `block`: its output and the gradient of its input."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, config.hidden, device=device, dtype=dtype)
    grad = torch.randn_like(x)
    cos, sin = rotary_angles(torch.arange(tokens, device=device), block.rotary_dim, config.rope_theta)

    def step() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = block(leaf, cos, sin)
        out.backward(grad)
        assert leaf.grad is not None
        found = [out.detach(), leaf.grad]
        block.zero_grad()
        return found

    return step


def _milliseconds(step: Callable[[], object], device: torch.device, task: CheckTask) -> float:
    """The fastest of a few runs."""
    return min(alone(device)(step) for _ in range(1 if task.dry else 5)) * 1e3
