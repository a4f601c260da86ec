"""Compares one MoE layer over several processes with the whole layer, on NCCL and gloo.

python -m moesys.measure.gpu_check.ranks RANK RANKS BACKEND DEVICE FILE SECONDS      # one process, started by the check
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from moesys.loopback import stay_here
from moesys.measure import checkout
from moesys.measure.gpu_check.rows import CheckTask, Row, tried
from moesys.measure.layer_benchmark.layer_times import LayerShape
from moesys.measure.layer_benchmark.sides import build
from moesys.parallel.dispatchers.all_to_all import AllToAllDispatcher

SHAPE = LayerShape(tokens=64, hidden=32, ffn_hidden=16, experts=8, top_k=2)
CLOSE = 1e-4
"""Largest relative difference of the distributed layer from the whole one, in float32."""

SHARING = "NCCL_MULTI_RANK_GPU_ENABLE"
"""A variable that lets NCCL use one GPU for several processes, since about 2.30. Older versions ignore it."""

REFUSALS = ("duplicate gpu", "multiple ranks", "invalid usage")
"""Words in NCCL's messages when it refuses two processes on one GPU."""


def run(task: CheckTask) -> Iterator[Row]:
    """A row for each number of processes, backend and device."""
    stay_here()
    yield tried(_equal, task, "2 processes on CPU, gloo", "gloo", ["cpu", "cpu"])
    if task.dry:
        yield Row("NCCL", "not run", "it needs a GPU; gloo carries the same layer's tokens above")
        return
    yield tried(_equal, task, "1 process on one GPU, NCCL", "nccl", ["cuda:0"])
    yield tried(_sharing, task, "2 processes on one GPU, NCCL")
    if torch.cuda.device_count() > 1:
        yield tried(_equal, task, "2 processes on two GPUs, NCCL", "nccl", ["cuda:0", "cuda:1"])
    else:
        yield Row("2 processes on two GPUs, NCCL", "not run", "torch sees one GPU")


def _equal(task: CheckTask, what: str, backend: str, devices: list[str]) -> Row:
    """A row: the layer over all ranks computes the same as one process, or not."""
    codes, texts = _processes(task, what, backend, devices)
    if any(code != 0 for code in codes):
        rank = next(n for n, code in enumerate(codes) if code != 0)
        return Row(what, "failed", f"rank {rank}: {_reason(texts[rank])}")
    return Row(what, "passed", "output and gradients are those of the whole layer")


def _sharing(task: CheckTask, what: str) -> Row:
    """A row for two processes on one GPU, which NCCL may refuse."""
    codes, texts = _processes(task, what, "nccl", ["cuda:0", "cuda:0"])
    if not any(code != 0 for code in codes):
        return Row(what, "passed", "NCCL takes both: output and gradients are those of the whole layer")
    lines = [line.strip() for text in texts for line in text.splitlines()]
    said = next((line for word in REFUSALS for line in lines if word in line.lower()), "")
    if said:
        return Row(what, "not run", f"NCCL refuses: {said}")
    return Row(what, "failed", _reason(texts[0]))


def _reason(text: str) -> str:
    """The error at the end of a process's output."""
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output")


def _processes(task: CheckTask, what: str, backend: str, devices: list[str]) -> tuple[list[int | None], list[str]]:
    """Exit codes of all processes, and their output. A process that takes too long is ended, with code None."""
    name = "-".join(what.replace(",", "").split())
    store = task.folder / f"{name}.store"
    store.unlink(missing_ok=True)
    ranks, limit = len(devices), task.seconds_left() / 2  # the rest is for later trials
    paths = [task.folder / f"{name}-rank{rank}.log" for rank in range(ranks)]
    running = []
    for rank, path in enumerate(paths):
        words = [str(rank), str(ranks), backend, devices[rank], str(store), str(limit)]
        command = [sys.executable, "-m", "moesys.measure.gpu_check.ranks", *words]
        with path.open("w", encoding="utf-8") as out:
            env = {**os.environ, "NCCL_DEBUG": "WARN", SHARING: "1"}
            running.append(subprocess.Popen(command, cwd=checkout.ROOT, env=env, stdout=out, stderr=out))
    codes: list[int | None] = []
    for process in running:
        try:
            codes.append(process.wait(limit))
        except subprocess.TimeoutExpired:
            codes.append(None)
    for process in running:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
    return codes, [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def work(rank: int, ranks: int, backend: str, device: torch.device, store: Path, limit: float) -> None:
    """Compare the layer with experts on all ranks with the whole layer, on this rank's own tokens.

    Raises:
        AssertionError: they differ.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(store), ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=limit),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        group = dist.group.WORLD
        assert group is not None
        torch.manual_seed(0)
        whole = build(SHAPE, torch.float32, torch.device("cpu"))
        torch.manual_seed(0)
        shared = build(SHAPE, torch.float32, torch.device("cpu"))
        local = SHAPE.experts // ranks
        for weight in ("fc1", "fc2"):
            part = getattr(shared.experts, weight)[rank * local : (rank + 1) * local].detach().clone()
            setattr(shared.experts, weight, nn.Parameter(part))
        shared.dispatcher = AllToAllDispatcher(SHAPE.experts, group, ranks, 1)
        torch.manual_seed(1 + rank)
        x, grad = torch.randn(1, SHAPE.tokens, SHAPE.hidden), torch.randn(1, SHAPE.tokens, SHAPE.hidden)
        results = []
        for layer in (shared, whole):
            leaf = x.to(device, copy=True).requires_grad_()
            out = layer.to(device)(leaf)
            out.backward(grad.to(device))
            assert leaf.grad is not None
            results.append((out.detach(), leaf.grad))
        for found, right in zip(*results, strict=True):
            error = float((found - right).norm() / right.norm())
            assert error <= CLOSE, f"relative difference from the whole layer: {error:.1e}"
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    number, count, kind, place, file, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    work(int(number), int(count), kind, torch.device(place), Path(file), float(seconds))
