"""Places ranks on nodes, and finds groups with much traffic that do not lie inside one node.

Ranks are laid out in order, `ranks_per_node` to a node; the meshes (`moesys.parallel.degrees`) put
tensor groups and then expert groups on neighbouring ranks, so that both fit in a node if their size does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesys.config.schema import ClusterConfig
from moesys.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees
from moesys.words import plural


@dataclass(frozen=True)
class Crossing:
    """Groups of one kind that span nodes.

    `severity` is "warning" for tensor groups, since every layer waits for the slow link several times, and "note" for
    expert groups, which often span nodes at scale.
    """

    severity: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


def place(degrees: Degrees, cluster: ClusterConfig) -> list[list[int]]:
    """The ranks of each node, first node to last."""
    per_node, world = cluster.ranks_per_node, degrees.world
    return [list(range(first, min(first + per_node, world))) for first in range(0, world, per_node)]


def check(degrees: Degrees, cluster: ClusterConfig) -> list[Crossing]:
    """The tensor and expert groups that cross nodes when ranks are placed as planned (`place`)."""
    node_of = [rank // cluster.ranks_per_node for rank in range(degrees.world)]
    return crossings(degrees, node_of)


def verify_map(degrees: Degrees, hosts: Sequence[str]) -> list[Crossing]:
    """The tensor and expert groups that cross nodes in a started run; `hosts[rank]` names a rank's node.

    A scheduler may have placed ranks otherwise than `check` assumes.
    """
    if len(hosts) != degrees.world:
        raise ValueError(f"{plural(len(hosts), 'host')} for a world of {plural(degrees.world, 'rank')}")
    names = {host: index for index, host in enumerate(dict.fromkeys(hosts))}
    return crossings(degrees, [names[host] for host in hosts])


def crossings(degrees: Degrees, node_of: Sequence[int]) -> list[Crossing]:
    """Tensor groups (tp) and expert groups (ep · etp) that span nodes; `node_of[rank]` is a node's number."""
    found = []
    tensor = crossing_blocks(degrees.tp, node_of)
    if tensor:
        numbers = describe("tensor groups", tensor, degrees.world // degrees.tp, f"tp({degrees.tp})")
        remedy = "each layer waits for its tensor group four times: choose a tp that divides the ranks of a node"
        found.append(Crossing("warning", f"{numbers}; {remedy}"))
    size = degrees.ep * degrees.etp
    experts = crossing_blocks(size, node_of)
    if experts:
        degree = f"ep({degrees.ep}) · etp({degrees.etp}) = {size}"
        numbers = describe("expert groups", experts, degrees.world // size, degree)
        found.append(Crossing("note", f"{numbers}; their all-to-all goes over the network between nodes"))
    return found


def crossing_blocks(size: int, node_of: Sequence[int]) -> list[tuple[int, int]]:
    """(first rank, nodes spanned) of every block of `size` consecutive ranks that spans several nodes.

    Tensor groups (axis tp) and expert groups (axes ep, etp) are such blocks, because those axes are the
    last, fastest ones of their meshes: no group has to be enumerated, which keeps thousands of ranks cheap.
    """
    assert DENSE_AXES[-1:] == ("tp",) and EXPERT_AXES[-2:] == ("ep", "etp")
    if size == 1:
        return []
    blocks = ((first, len(set(node_of[first : first + size]))) for first in range(0, len(node_of), size))
    return [(first, nodes) for first, nodes in blocks if nodes > 1]


def describe(kind: str, blocks: list[tuple[int, int]], total: int, degree: str) -> str:
    """ "2 of 4 tensor groups of tp(3) cross nodes (the first starts at rank 3, on 2 nodes)"."""
    first, nodes = blocks[0]
    where = f"the first starts at rank {first}, on {plural(nodes, 'node')}"
    return f"{len(blocks)} of {total} {kind} of {degree} cross nodes ({where})"
