"""Statistics of gates over the global batch of a step, and the numbers of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.moe.gates import Gate
from moesys.moe.layer import MoELayer
from moesys.parallel.mesh import Ranks
from moesys.parallel.to_device import to_device


def numbers(tokens: Tensor, samples: Sequence[int]) -> Tensor:
    """Each token's number in the run, int64 [B, S], of the sequences `samples`; below 0 where these are."""
    length = tokens.shape[1]
    first = to_device(torch.from_numpy(np.asarray(samples)), tokens.device)[:, None] * length
    return first + torch.arange(length, device=tokens.device)


def later(x: Tensor, depth: int, filler: int) -> list[Tensor]:
    """x [B, S] as it is 1, …, `depth` places later in each sequence; `filler` after its end."""
    ends = x.new_full((len(x), depth), filler)
    return [torch.cat((x[:, k:], ends[:, :k]), 1) for k in range(1, depth + 1)]


def step_totals(gates: Sequence[Gate], mesh: Ranks) -> list[tuple[Gate, Tensor]]:
    """Of gates that have statistics: their sums over the stage's ranks, float64. Collective over the stage."""
    found = [(gate, s) for gate in gates if (s := gate.step_statistics()) is not None]
    if not found:
        return []
    total = torch.cat([statistics.double() for _, statistics in found])
    for group in (mesh.group("dp_replicate", "dp_shard", "cp"), mesh.group("tp")):
        if group is not None:
            dist.all_reduce(total, group=group)
    parts = total.split([s.numel() for _, s in found])
    return [(gate, part) for (gate, _), part in zip(found, parts, strict=True)]


@contextmanager
def counted(layers: Mapping[str, MoELayer], mesh: Ranks) -> Iterator[None]:
    """Context of a forward pass that counts the global batch for gates that need it, and changes nothing else."""
    kept = [layer.statistics.take() for layer in layers.values()]
    yield
    for layer, statistics in zip(layers.values(), kept, strict=True):
        layer.statistics.take()
        layer.statistics.totals = dict(statistics)
    for gate, total in step_totals([layer.gate for layer in layers.values() if layer.gate.counts_first], mesh):
        gate.before_step(total)
