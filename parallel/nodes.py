"""Which node every rank of a group runs on, and how the group divides among nodes. Needs no torch."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence

from moesys.config.schema import ClusterConfig

OVERRIDE = "MOESYS_NODES"
"""Names this variable gives the nodes: one number per rank, as in "0,0,1,1". For experiments on one machine."""


def planned(ranks: Sequence[int], cluster: ClusterConfig) -> list[int]:
    """The node of each of `ranks` when they are placed in order, `ranks_per_node` to a node."""
    return [rank // cluster.ranks_per_node for rank in ranks]


def here(rank: int, world: int, cluster: ClusterConfig) -> str:
    """A name of this rank's node that no other node has.

    Where all ranks run on this machine, the nodes that the configuration speaks of are only played.
    """
    if OVERRIDE in os.environ:
        return os.environ[OVERRIDE].split(",")[rank]
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world:
        return str(planned([rank], cluster)[0])
    return os.environ.get("MOESYS_NODE_IP", "") + socket.gethostname()


def members(nodes: Sequence[object]) -> list[list[int]]:
    """The places in the group that lie on each node, in order of the nodes' first."""
    found: dict[object, list[int]] = {}
    for place, node in enumerate(nodes):
        found.setdefault(node, []).append(place)
    return list(found.values())


def even(nodes: Sequence[object]) -> bool:
    """Whether every node has as many of the group."""
    return len(set(Counter(nodes).values())) == 1
