"""One MoE layer whose experts lie over several processes, beside Megatron-Core's and DeepSpeed's, on gloo.

What counts is the time beyond the layer's arithmetic: the same rows through local experts, without travel.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from moesys.measure import deepspeed_layer
from moesys.measure.bench_layer import Shape, both, build, dense
from moesys.measure.interleave import Step
from moesys.moe import MoELayer
from moesys.parallel.dispatchers.all_gather import AllGatherDispatcher
from moesys.parallel.dispatchers.all_to_all import AllToAllDispatcher

OURS = {"all_to_all": AllToAllDispatcher, "all_gather": AllGatherDispatcher}

Peers = Callable[[MoELayer, int, int, int], AbstractContextManager[dict[str, nn.Module]]]
"""(our layer, E, k, ranks) → other systems' layers with its weights, in a context in which they work."""


@dataclass(frozen=True)
class Result:
    """Median milliseconds of every side (of each step the slowest rank's) and the time beyond the arithmetic."""

    shape: Shape
    dtype: str
    ranks: int
    milliseconds: dict[str, float]
    beyond: dict[str, float]
    rounds: int
    date: str = field(default_factory=lambda: date.today().isoformat())

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The result as text."""
        s, ours = self.shape, self.beyond["moesys all_to_all"]
        lines = [
            f"{self.ranks} processes, each T={s.tokens} H={s.hidden} F={s.ffn_hidden} E={s.experts} k={s.top_k}, "
            f"{self.dtype}, forward and backward, medians of {self.rounds} interleaved rounds",
            f"  {'arithmetic alone':<24} {self.milliseconds['arithmetic']:>9.2f} ms",
        ]
        for name, beyond in self.beyond.items():
            said = "" if name.startswith("moesys") else f"   ours / theirs {ours / beyond:.2f}" if beyond > 0 else ""
            lines.append(f"  {name:<24} {self.milliseconds[name]:>9.2f} ms, {beyond:>8.2f} ms beyond it{said}")
        if "deepspeed" not in self.beyond:
            lines.append("  deepspeed is not installed")
        return lines


def run(shape: Shape, dtype: torch.dtype, ranks: int, rounds: int, peers: Peers) -> Result:
    """Time the layer on `ranks` processes of this machine, its cores divided among them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["moesys.measure.bench_ranks"])
    with tempfile.TemporaryDirectory(prefix="moesys-bench-") as folder:
        arguments = (ranks, shape, dtype, rounds, folder, peers)
        mp.start_processes(_work, arguments, nprocs=ranks, start_method="forkserver")
        seconds: dict[str, list[float]] = torch.load(Path(folder) / "seconds.pt")
    medians = {name: 1e3 * median(values) for name, values in seconds.items()}
    beyond = {
        name: 1e3 * median(a - b for a, b in zip(values, seconds["arithmetic"], strict=True))
        for name, values in seconds.items()
        if name != "arithmetic"
    }
    return Result(shape, str(dtype).removeprefix("torch."), ranks, medians, beyond, rounds)


def _work(rank: int, ranks: int, shape: Shape, dtype: torch.dtype, rounds: int, folder: str, peers: Peers) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    try:
        with sides(shape, dtype, peers) as layers:
            torch.manual_seed(rank)
            x = torch.randn(1, shape.tokens, shape.hidden, dtype=dtype)
            grad = torch.randn_like(x)
            seconds = _interleave({name: both(module, x, grad) for name, module in layers.items()}, rounds)
        if rank == 0:
            torch.save(seconds, f"{folder}/seconds.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def sides(shape: Shape, dtype: torch.dtype, peers: Peers) -> Iterator[dict[str, nn.Module]]:
    """Every side's layer on this rank, all with the same weights. Collective over the world."""
    cpu, group = torch.device("cpu"), dist.group.WORLD
    assert group is not None
    ranks, local = group.size(), shape.experts // group.size()
    mine = slice(group.rank() * local, (group.rank() + 1) * local)
    found: dict[str, nn.Module] = {"arithmetic": dense(shape, dtype, cpu)}
    for name, kind in OURS.items():
        torch.manual_seed(0)
        layer = build(shape, dtype, cpu)
        for weight in ("fc1", "fc2"):
            part = getattr(layer.experts, weight)[mine].detach().clone()
            setattr(layer.experts, weight, nn.Parameter(part))
        layer.dispatcher = kind(shape.experts, group, ranks, 1)
        found[f"moesys {name}"] = layer
    with peers(layer, shape.experts, shape.top_k, ranks) as others, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the others' own
        found |= others
        if deepspeed_layer.installed():
            size = (shape.hidden, shape.ffn_hidden, shape.experts, shape.top_k)
            found["deepspeed"] = deepspeed_layer.DeepSpeedLayer(*size, dtype)
        yield found


def _interleave(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of the slowest rank in every round, the order alternating; all begin a step together."""
    names = list(steps)
    for name in names * 2:
        steps[name]()
    taken = torch.zeros(len(names), rounds, dtype=torch.float64)
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            dist.barrier()
            begin = perf_counter()
            steps[name]()
            taken[names.index(name), number] = perf_counter() - begin
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return dict(zip(names, taken.tolist(), strict=True))
