"""Times one MoE layer with experts on several processes, beside Megatron-Core's and DeepSpeed's, on gloo.

The result is the time beyond the layer's arithmetic: beyond as many rows through one dense feed-forward, in the type of
the layer's products.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from moesys import leftovers
from moesys.kernels.cpu.expert_ffn_blocked import working_type
from moesys.loopback import stay_here
from moesys.measure.interleaved_timing import interleave, slowest
from moesys.measure.layer_benchmark.layer_times import LayerShape
from moesys.measure.layer_benchmark.other_systems import OtherSystems
from moesys.measure.layer_benchmark.sides import both, build, dense
from moesys.parallel.dispatchers.all_gather import AllGatherDispatcher
from moesys.parallel.dispatchers.all_to_all import AllToAllDispatcher
from moesys.words import plural

OURS = {"all_to_all": AllToAllDispatcher, "all_gather": AllGatherDispatcher}


@dataclass(frozen=True)
class ShardedLayerTimes:
    """Median milliseconds of every side (the slowest rank's in each step), and the time beyond its arithmetic."""

    shape: LayerShape
    dtype: str
    ranks: int
    milliseconds: dict[str, float]
    beyond: dict[str, float]
    rounds: int
    date: str = field(default_factory=lambda: date.today().isoformat())

    def as_json(self) -> dict[str, object]:
        """All figures."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The result as text."""
        s, ours = self.shape, self.beyond["moesys all_to_all"]
        rounds = plural(self.rounds, "interleaved round")
        lines = [
            f"{plural(self.ranks, 'process', 'processes')}, each T={s.tokens} H={s.hidden} F={s.ffn_hidden} "
            f"E={s.experts} k={s.top_k}, {self.dtype}, forward and backward, medians of {rounds}",
        ]
        lines += [f"  {name:<24} {ms:>9.2f} ms" for name, ms in self.milliseconds.items() if name not in self.beyond]
        for name, beyond in self.beyond.items():
            compared = not name.startswith("moesys") and beyond > 0
            said = f"   ours / theirs {ours / beyond:.2f}  target 1.00" if compared else ""
            lines.append(f"  {name:<24} {self.milliseconds[name]:>9.2f} ms, {beyond:>8.2f} ms beyond it{said}")
        return lines


def run(
    shape: LayerShape, dtype: torch.dtype, ranks: int, rounds: int | None, others: OtherSystems
) -> ShardedLayerTimes:
    """Time the layer on `ranks` processes of this machine, its cores divided among them."""
    stay_here()
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["moesys.measure.layer_benchmark.many_ranks"])
    with leftovers.temporary("bench") as folder:
        arguments = (ranks, shape, dtype, rounds, str(folder), others)
        mp.start_processes(_work, arguments, nprocs=ranks, start_method="forkserver")
        seconds: dict[str, list[float]] = torch.load(folder / "seconds.pt")
    beyond = {}
    for side in (name for name in seconds if not name.startswith("arithmetic")):
        multiplies_in = working_type(dtype) if side.startswith("moesys") else dtype
        floor = seconds[arithmetic(multiplies_in)]
        beyond[side] = 1e3 * median(a - b for a, b in zip(seconds[side], floor, strict=True))
    medians = {name: 1e3 * median(values) for name, values in seconds.items()}
    return ShardedLayerTimes(shape, _name(dtype), ranks, medians, beyond, len(seconds[arithmetic(dtype)]))


def _work(
    rank: int, ranks: int, shape: LayerShape, dtype: torch.dtype, rounds: int | None, folder: str, others: OtherSystems
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    try:
        with sides(shape, dtype, others) as layers:
            torch.manual_seed(rank)
            x = torch.randn(1, shape.tokens, shape.hidden, dtype=dtype)
            grad = torch.randn_like(x)
            steps = {name: both(module, x, grad) for name, module in layers.items()}
            steps |= {
                arithmetic(kind): both(dense(shape, kind, x.device), x.to(kind), grad.to(kind))
                for kind in dict.fromkeys((dtype, working_type(dtype)))
            }
            what = f"timing in {_name(dtype)}" if rank == 0 else ""
            seconds = interleave(steps, rounds, slowest, what=what)
        if rank == 0:
            torch.save(seconds, f"{folder}/seconds.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def arithmetic(dtype: torch.dtype) -> str:
    """The name of the side with the layer's products alone."""
    return f"arithmetic in {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def sides(shape: LayerShape, dtype: torch.dtype, others: OtherSystems) -> Iterator[dict[str, nn.Module]]:
    """Every side's layer on this rank, all with the same weights. Collective over the world."""
    cpu, group = torch.device("cpu"), dist.group.WORLD
    assert group is not None
    ranks, local = group.size(), shape.experts // group.size()
    mine = slice(group.rank() * local, (group.rank() + 1) * local)
    found: dict[str, nn.Module] = {}
    for name, kind in OURS.items():
        torch.manual_seed(0)
        layer = build(shape, dtype, cpu)
        for weight in ("fc1", "fc2"):
            part = getattr(layer.experts, weight)[mine].detach().clone()
            setattr(layer.experts, weight, nn.Parameter(part))
        layer.dispatcher = kind(shape.experts, group, ranks, 1)
        found[f"moesys {name}"] = layer
    with others.over_ranks(layer, shape, dtype) as theirs, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the other systems
        yield found | theirs
