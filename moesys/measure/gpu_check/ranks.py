"""One MoE layer over several processes: what NCCL and gloo do with them on this machine.

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
from moesys.measure.layer_benchmark.shape import LayerShape
from moesys.measure.layer_benchmark.sides import build
from moesys.parallel.dispatchers.all_to_all import AllToAllDispatcher

SHAPE = LayerShape(tokens=64, hidden=32, ffn_hidden=16, experts=8, top_k=2)
CLOSE = 1e-4
"""Most that the distributed layer may differ from the whole one, in float32, as a part of it."""

SHARING = "NCCL_MULTI_RANK_GPU_ENABLE"
"""Lets NCCL take several processes on one GPU, from about 2.30 on; older ones do not know it."""

REFUSALS = ("duplicate gpu", "multiple ranks", "invalid usage")
"""What NCCL says where it does not take two processes on one GPU."""


def run(task: CheckTask) -> Iterator[Row]:
    """A row for each number of processes, backend and place."""
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
    """Whether the layer over all ranks computes what one process does."""
    codes, texts = _processes(task, what, backend, devices)
    if any(code != 0 for code in codes):
        rank = next(n for n, code in enumerate(codes) if code != 0)
        return Row(what, "failed", f"rank {rank}: {_reason(texts[rank])}")
    return Row(what, "passed", "output and gradients are those of the whole layer")


def _sharing(task: CheckTask, what: str) -> Row:
    """What NCCL says of two processes on one GPU, which it may refuse."""
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
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no word")


def _processes(task: CheckTask, what: str, backend: str, devices: list[str]) -> tuple[list[int | None], list[str]]:
    """Exit codes of all processes, and what they wrote; one that takes too long is ended, with a code of None."""
    name = "-".join(what.replace(",", "").split())
    meeting = task.folder / f"{name}.store"
    meeting.unlink(missing_ok=True)
    ranks, limit = len(devices), task.seconds_left() / 2  # the rest is for the trials after this one
    paths = [task.folder / f"{name}-rank{rank}.log" for rank in range(ranks)]
    running = []
    for rank, path in enumerate(paths):
        words = [str(rank), str(ranks), backend, devices[rank], str(meeting), str(limit)]
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


def work(rank: int, ranks: int, backend: str, device: torch.device, meeting: Path, limit: float) -> None:
    """Compare the layer whose experts lie over the ranks with the whole one, on tokens of this rank's own.

    Raises:
        AssertionError: they differ.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(meeting), ranks),
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
            given = x.to(device, copy=True).requires_grad_()
            out = layer.to(device)(given)
            out.backward(grad.to(device))
            assert given.grad is not None
            results.append((out.detach(), given.grad))
        for found, right in zip(*results, strict=True):
            error = float((found - right).norm() / right.norm())
            assert error <= CLOSE, f"it differs from the whole layer by {error:.1e} of that"
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    number, count, kind, place, file, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    work(int(number), int(count), kind, torch.device(place), Path(file), float(seconds))
