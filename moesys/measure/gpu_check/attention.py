"""Checks which of torch's attention kernels run for the shipped models' shapes, and times them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode

from moesys.measure.gpu_check import models
from moesys.measure.gpu_check.rows import CheckTask, Row, first_line, tried
from moesys.measure.interleaved_timing import alone
from moesys.models.attention import attend
from moesys.models.parts.model import block

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TOKENS, FEW = 4096, 64
"""Tokens of a sequence, and of a dry run's sequence."""

SHARE = 4
"""Context parallelism in the check: this part of the queries attends to all keys."""


class AttentionShape(NamedTuple):
    """h query heads and g key heads of size d; values have size dv."""

    h: int
    g: int
    d: int
    dv: int


def shapes() -> dict[AttentionShape, list[str]]:
    """Every attention shape of the shipped models, with the names of its models."""
    found: dict[AttentionShape, list[str]] = {}
    for name, section in models.sections().items():
        model = models.config(section)
        shape = AttentionShape(*block(model, 0).mixer.head_sizes())
        found.setdefault(shape, []).append(name)
    return found


class _KernelWatch(TorchDispatchMode):
    """Notes the kernel that computes attention."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = ""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(op.overloadpacket)
        if "attention" in name and not name.endswith("backward"):
            self.ran = next((kind for kind in BACKENDS if kind in name), name)
        elif "softmax" in name and not self.ran:
            self.ran = "math"
        return op(*args, **(kwargs or {}))


def ran(work: Callable[[], object]) -> str:
    """The kind of kernel with which `work` computes attention: a key of `BACKENDS`, or its own name; "" for none."""
    with _KernelWatch() as watch:
        work()
    return watch.ran


def run(task: CheckTask) -> Iterator[Row]:
    """A row for each shape, with whole sequences and with the queries of a context rank."""
    for shape, names in shapes().items():
        for queries in ("whole", "context parallel"):
            what = f"{queries}: {shape.h} heads of {shape.d}"
            what += f", {shape.g} of keys" if shape.g != shape.h else ""
            what += f", values of {shape.dv}" if shape.dv != shape.d else ""
            what += f" ({', '.join(names)})"
            yield tried(_row, task, what, shape, queries)
    if task.dry:
        yield Row("the kernels of CUDA", "not run", "they need a GPU; above is which of the CPU's runs")


def _row(task: CheckTask, what: str, shape: AttentionShape, queries: str) -> Row:
    """The kernel that torch chooses, and the time of every kernel, forward and backward."""
    tokens = FEW if task.dry else TOKENS
    step = _step(task.device, shape, tokens // (SHARE if queries == "context parallel" else 1), tokens)
    chosen = ran(step)
    figures: dict[str, float | int | str | None] = {"runs": chosen, "tokens": tokens}
    if task.dry:
        return Row(what, "passed" if chosen else "failed", f"{chosen or 'none'} runs on CPU", figures)
    times = []
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                step()
                milliseconds = min(alone(torch.device("cuda"))(step) for _ in range(3)) * 1e3
        except RuntimeError as error:  # the kernel refuses this shape, or has too little memory
            print(f"{what}: {name}: {first_line(error)}", flush=True)
            figures[f"{name}_ms"] = None
            continue
        figures[f"{name}_ms"] = round(milliseconds, 3)
        times.append(f"{name} {milliseconds:.2f} ms")
    refused = [name for name in BACKENDS if figures[f"{name}_ms"] is None]
    said = f"{chosen} runs; forward and backward {', '.join(times)}"
    said += f"; refused by {', '.join(refused)}" if refused else ""
    if chosen == "math":
        return Row(what, "failed", f"{said}: the quadratic kernel runs, memory grows as tokens²", figures)
    return Row(what, "passed", said, figures)


def _step(device: str, shape: AttentionShape, queries: int, keys: int) -> Callable[[], None]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = ((queries, shape.h, shape.d), (keys, shape.g, shape.d), (keys, shape.g, shape.dv))
    q, k, v = (torch.randn(1, *size, device=device, dtype=dtype, requires_grad=True) for size in sizes)

    # A context rank makes the bias beforehand, too.
    bias = causal_lower_right(queries, keys) if queries < keys else None

    def step() -> None:
        out: Tensor = attend(q, k, v, bias)
        torch.autograd.grad(out.sum(), (q, k, v))

    return step
