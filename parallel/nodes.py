"""The node of every rank of a group, and the division of the group among nodes. Needs no torch."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesys.config.schema import ClusterConfig

OVERRIDE = "MOESYS_NODES"
"""Environment variable that names the node of each rank, as in "0,0,1,1", for experiments on one machine."""


def planned(ranks: Sequence[int], cluster: ClusterConfig) -> list[int]:
    """The node of each of `ranks` when they are placed in order, `ranks_per_node` to a node."""
    return [rank // cluster.ranks_per_node for rank in ranks]


def here(rank: int, world: int, cluster: ClusterConfig) -> str:
    """A name of this rank's node that no other node has.

    If all ranks run on this machine, the nodes of the configuration are only simulated.
    """
    if OVERRIDE in os.environ:
        return os.environ[OVERRIDE].split(",")[rank]
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world:
        return str(planned([rank], cluster)[0])
    return " ".join(filter(None, (os.environ.get("MOESYS_NODE_IP"), socket.gethostname())))


def members(nodes: Sequence[object]) -> list[list[int]]:
    """Places in the group on each node; nodes are in the order of their first place."""
    found: dict[object, list[int]] = {}
    for place, node in enumerate(nodes):
        found.setdefault(node, []).append(place)
    return list(found.values())


def even(nodes: Sequence[object]) -> bool:
    """Whether every node has the same number of ranks."""
    return len(set(Counter(nodes).values())) == 1
