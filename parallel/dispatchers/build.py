"""The dispatcher that a configuration names, on this rank's groups."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moesys.config.schema import ClusterConfig, Config
from moesys.parallel import nodes
from moesys.parallel.dispatchers.all_gather import AllGatherDispatcher
from moesys.parallel.dispatchers.all_to_all import AllToAllDispatcher
from moesys.parallel.dispatchers.base import ExpertParallelDispatcher
from moesys.parallel.dispatchers.hierarchical import HierarchicalDispatcher
from moesys.parallel.dispatchers.level import Level
from moesys.parallel.mesh import Ranks

KINDS: dict[str, type[ExpertParallelDispatcher]] = {
    "all_to_all": AllToAllDispatcher,
    "all_gather": AllGatherDispatcher,
    "hierarchical": HierarchicalDispatcher,
}


_LEVELS: WeakKeyDictionary[Ranks, dict[tuple[str, ...], list[Level]]] = WeakKeyDictionary()
"""All layers on a mesh share their groups: by the nodes of the expert group's ranks."""


def builder(config: Config, mesh: Ranks) -> Callable[[int], ExpertParallelDispatcher] | None:
    """Makes the dispatcher of a layer of so many experts; None where experts are whole on this rank.

    Collective over the ranks of this rank's expert group.
    """
    group = mesh.group("ep", "etp")
    if group is None:
        return None
    d = config.parallel.dispatch
    more: dict[str, Any] = {"chunks": d.chunks, "overlap_shared": d.overlap_shared, "payload": d.payload}
    if d.kind == "hierarchical":
        more["levels"] = _shared_levels(config, mesh, group)
    return lambda experts: KINDS[d.kind](experts, group, mesh.degrees.ep, mesh.degrees.etp, **more)


def dispatchers(
    group: dist.ProcessGroup, kind: str, device: torch.device, timeout_s: float = 1800.0, **options: Any
) -> Callable[[int], ExpertParallelDispatcher]:
    """Makes the dispatcher of a layer of so many experts, which the ranks of `group` share. Collective over it."""
    if kind == "hierarchical":
        names: list[Any] = [None] * group.size()
        world = dist.get_world_size()
        one_machine = ClusterConfig(nodes=1, ranks_per_node=world)
        dist.all_gather_object(names, nodes.here(dist.get_rank(), world, one_machine), group=group)
        options["levels"] = levels(group, names, device, timedelta(seconds=timeout_s))
    return lambda experts: KINDS[kind](experts, group, group.size(), 1, **options)


def _shared_levels(config: Config, mesh: Ranks, group: dist.ProcessGroup) -> list[Level]:
    names: list[Any] = [None] * group.size()
    dist.all_gather_object(names, nodes.here(mesh.rank, mesh.degrees.world, config.cluster), group=group)
    known = _LEVELS.setdefault(mesh, {})
    if tuple(names) not in known:
        known[tuple(names)] = levels(group, names, mesh.device, timedelta(seconds=config.launch.timeout_s))
    return known[tuple(names)]


def levels(group: dist.ProcessGroup, names: list[str], device: torch.device, timeout: timedelta) -> list[Level]:
    """The levels of `group`, whose ranks run on the nodes `names`. Collective over it.

    Rails between nodes, then the node; one level where all ranks are on one node, or each on its own, or
    where nodes have unequal parts of the group, so that there are no rails.
    """
    ranks, members = dist.get_process_group_ranks(group), nodes.members(names)
    everyone = tuple(range(len(ranks)))
    if len(members) == 1 or len(members) == len(ranks) or not nodes.even(names):
        name = "intra" if len(members) == 1 else "inter" if len(members) == len(ranks) else "flat"
        return [Level(name, group, everyone)]
    node = next(m for m in members if group.rank() in m)
    rail = [m[node.index(group.rank())] for m in members]
    sorted_rail = sorted(rail)
    node_of = {place: sorted_rail.index(at) for m, at in zip(members, rail, strict=True) for place in m}
    place_of = {place: m.index(place) for m in members for place in m}
    made = [_connected([ranks[place] for place in own], device, timeout) for own in (sorted_rail, node)]
    return [
        Level("inter", made[0], tuple(node_of[place] for place in everyone)),
        Level("intra", made[1], tuple(place_of[place] for place in everyone)),
    ]


def _connected(ranks: list[int], device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    """A new group of `ranks`, made by them alone, in which everyone has met."""
    group = dist.new_group(ranks, timeout, use_local_synchronization=True)
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group
