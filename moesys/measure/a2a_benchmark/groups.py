"""The groups of ranks that the benchmark measures: of a node, between nodes, of experts, and all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moesys.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class BenchmarkGroup:
    """This rank's group of a kind, and all groups of that kind, which communicate at the same time.

    Attributes:
        all: the ranks of each group.
        also: names of other kinds with the same groups.
    """

    name: str
    own: dist.ProcessGroup
    all: list[list[int]]
    also: tuple[str, ...] = ()


def groups(mesh: ParallelMesh, names: Sequence[str], nodes: list[str]) -> list[BenchmarkGroup]:
    """This rank's groups of more than one rank of the kinds in `names`, each once. Collective over the world."""
    made = []
    for every, same in divisions(names, nodes, mesh.degrees.ep * mesh.degrees.etp):
        own = [dist.new_group(ranks) for ranks in every]
        mine = next(i for i, ranks in enumerate(every) if mesh.rank in ranks)
        made.append(BenchmarkGroup(same[0], own[mine], every, tuple(same[1:])))
    return made


def divisions(names: Sequence[str], nodes: Sequence[str], size: int) -> list[tuple[list[list[int]], list[str]]]:
    """The divisions of the world by `names`, each with all names that divide alike.

    nodes: the node of each rank. size: ranks that share the experts.
    """
    world = list(range(len(nodes)))
    members = [[rank for rank in world if nodes[rank] == node] for node in dict.fromkeys(nodes)]
    found: dict[str, list[list[int]]] = {"world": [world], "intra": members}
    if len({len(m) for m in members}) == 1:
        found["inter"] = [list(rail) for rail in zip(*members, strict=True)]
    found["expert"] = [world[i : i + size] for i in range(0, len(world), size)]
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        every = [ranks for ranks in found.get(name, []) if len(ranks) > 1]
        if sum(map(len, every)) == len(world):
            # Several groups between nodes share the links of a node, so their limit is counted by node.
            rails = name == "inter" and len(every) > 1
            alike.setdefault((rails, tuple(map(tuple, every))), []).append(name)
    return [([list(ranks) for ranks in every], same) for (_, every), same in alike.items()]
