"""The levels of hierarchical dispatch: process groups between nodes and inside a node."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moesys.parallel import nodes
from moesys.parallel.dispatchers.ranks import ExpertRanks


@dataclass(frozen=True)
class Level:
    """One level of a hierarchy: rows for rank r of the experts' group go to rank `destination[r]` of `group`.

    `name` is "inter" nodes, "intra" a node, or "flat" where there is one level only.
    """

    name: str
    group: dist.ProcessGroup
    destination: tuple[int, ...]


def shared_levels(ranks: ExpertRanks) -> list[Level]:
    """The levels of `ranks` on their present nodes; all layers share them. Collective over `ranks.group`."""
    names: list[Any] = [None] * ranks.group.size()
    dist.all_gather_object(names, ranks.node, group=ranks.group)
    key = ("levels", *names)
    if key not in ranks.shared:
        ranks.shared[key] = levels(ranks.group, names, ranks.device, ranks.timeout)
    found: list[Level] = ranks.shared[key]
    return found


def levels(group: dist.ProcessGroup, names: list[str], device: torch.device, timeout: timedelta) -> list[Level]:
    """The levels of `group`, whose ranks run on the nodes `names`. Collective over it.

    Rails between nodes, then the node. There is one level where all ranks are on one node, or each on its own, or
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
    """A new group of `ranks`, made by them alone, which is connected when this returns."""
    group = dist.new_group(ranks, timeout, use_local_synchronization=True)
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group
