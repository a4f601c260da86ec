"""Makes the dispatchers that a configuration names, on this rank's groups."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moesys.config.schema import ClusterConfig, Config
from moesys.config.values import config_of
from moesys.parallel import nodes
from moesys.parallel.dispatchers.base import ExpertParallelDispatcher
from moesys.parallel.dispatchers.kind import describe
from moesys.parallel.dispatchers.ranks import ExpertRanks
from moesys.parallel.mesh import Ranks

_SHARED: WeakKeyDictionary[Ranks, dict[Hashable, Any]] = WeakKeyDictionary()
"""`ExpertRanks.shared` of each mesh: all its layers share the groups that dispatchers make."""


def builder(config: Config, mesh: Ranks) -> Callable[[int], ExpertParallelDispatcher] | None:
    """A function that makes the dispatcher of a layer of so many experts; None where this rank holds all experts.

    Collective over the ranks of this rank's expert group.
    """
    group, d = mesh.group("ep", "etp"), mesh.degrees
    if group is None:
        return None
    node, timeout = nodes.here(mesh.rank, d.world, config.cluster), timedelta(seconds=config.launch.timeout_s)
    shared = _SHARED.setdefault(mesh, {})
    ranks = ExpertRanks(group, d.ep, d.etp, mesh.device, timeout, node, shared=shared)
    return describe(config.parallel.dispatch).build(ranks)


def dispatchers(
    group: dist.ProcessGroup, device: torch.device, timeout_s: float = 1800.0, **keys: Any
) -> Callable[[int], ExpertParallelDispatcher]:
    """A function that makes the dispatcher of a layer of so many experts, which the ranks of `group` share.

    Collective over `group`. `keys`: those of `parallel.dispatch`.

    Raises:
        ConfigError: a key that does not exist, or an illegal value.
    """
    config = config_of({"model": {"hidden": 1, "layers": 1, "ffn_hidden": 1}, "parallel": {"dispatch": keys}})
    world = dist.get_world_size()
    node = nodes.here(dist.get_rank(), world, ClusterConfig(nodes=1, ranks_per_node=world))
    ranks = ExpertRanks(group, group.size(), 1, device, timedelta(seconds=timeout_s), node)
    return describe(config.parallel.dispatch).build(ranks)
