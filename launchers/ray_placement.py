"""The placement that Ray is asked for: nodes, and each worker's share of their resources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moesys.config.schema import Config
from moesys.errors import LaunchError
from moesys.launchers.ray_cluster import Node
from moesys.train import device
from moesys.words import plural

NODE_ID_LABEL = "ray.io/node-id"


@dataclass(frozen=True)
class Placement:
    """A request to Ray.

    `resources` are one worker's; `labels`, one entry per rank, pins ranks to nodes (None: they are free);
    `cores` are those of the smallest node.
    """

    device: str
    resources: dict[str, float]
    strategy: str
    labels: list[dict[str, str]] | None
    cores: int


def choose(config: Config, world: int, nodes: Sequence[Node], where: str) -> Placement:
    """The placement of `world` ranks on `nodes`, ranks_per_node neighbouring ranks on each.

    Ray packs as many workers on a node as its logical resources allow, which need not be ranks_per_node;
    so on several nodes each rank is pinned. Ranks are free only if restarts are allowed, because a restart may have to
    do without a node. Raises `LaunchError` if there are too few nodes.
    """
    cluster = config.cluster
    per_node = math.ceil(world / cluster.nodes)
    kind = device.choose(cluster, [node.gpus for node in nodes], per_node, where)
    able = [node for node in nodes if (node.gpus >= per_node if kind == "cuda" else node.cpus > 0)]
    if len(able) < cluster.nodes:
        needs = f"the run needs {plural(cluster.nodes, 'node')} for {per_node} ranks each"
        raise LaunchError(
            f"{needs}; {where} has {plural(len(able), 'node')} with CPUs"
            "\n    remedy: set cluster.nodes to what is there, or start Ray on more nodes"
        )
    preferred = sorted(able, key=lambda node: not node.free)[: cluster.nodes]
    chosen = [node for node in nodes if node in preferred]
    cpus = min(node.cpus for node in chosen)
    resources = {"CPU": min(1.0, math.floor(cpus / per_node * 1000) / 1000)}
    if kind == "cuda":
        resources["GPU"] = 1.0
    pinned = cluster.nodes > 1 and config.launch.max_failures == 0
    return Placement(
        device=kind,
        resources=resources,
        strategy="PACK" if cluster.nodes > 1 else "STRICT_PACK",
        labels=[{NODE_ID_LABEL: chosen[rank // per_node].id} for rank in range(world)] if pinned else None,
        cores=max(1, int(cpus)),
    )
