"""The degrees of parallelism of a run, resolved from the configuration and the world size.

"axis" is a dimension of a mesh of ranks, "dim" one of a tensor, everywhere in this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

from moesys.config.schema import Config
from moesys.errors import Problem
from moesys.words import divisors, plural

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Axes of the mesh for dense layers, outermost first: the groups that talk most are neighbours."""
EXPERT_AXES = ("pp", "edp_replicate", "edp_shard", "ep", "etp")
"""Axes of the mesh for experts, over the same ranks."""
MOST_RANKS = 2**18
"""Of a world: groups are enumerated rank by rank."""


@dataclass(frozen=True)
class Degrees:
    """Sizes of all axes of both meshes.

    In every pipeline stage `dp_replicate·dp_shard·cp·tp = edp_replicate·edp_shard·ep·etp` ("folded"
    meshes, MoE Parallel Folding, arXiv 2504.14960): expert groups span neighbouring tensor,
    context and data ranks.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    edp_replicate: int = 1
    edp_shard: int = 1

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.pp * self.stage

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.cp * self.tp

    @property
    def dp(self) -> int:
        """The number of ranks that see different sequences."""
        return self.dp_replicate * self.dp_shard

    def sizes(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The number of ranks along each of `axes`."""
        return tuple(getattr(self, axis) for axis in axes)

    def coordinates(self, rank: int, axes: tuple[str, ...]) -> dict[str, int]:
        """Where `rank` lies on each of `axes` (row-major, the last axis fastest)."""
        place = {}
        for axis in reversed(axes):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return {axis: place[axis] for axis in axes}

    def groups(self, along: tuple[str, ...], axes: tuple[str, ...] = DENSE_AXES) -> list[list[int]]:
        """The groups of ranks that differ only on the axes `along`, each in rank order."""
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(prod(self.sizes(axes))):
            place = self.coordinates(rank, axes)
            rest = tuple(place[axis] for axis in axes if axis not in along)
            members.setdefault(rest, []).append(rank)
        return list(members.values())


def resolve(config: Config, world: int | None = None) -> tuple[Degrees | None, list[Problem]]:
    """The degrees of `config` on `world` ranks (default: the cluster's), or what makes them impossible."""
    p, cluster = config.parallel, config.cluster
    ranks = cluster.nodes * cluster.ranks_per_node if world is None else world
    if ranks > MOST_RANKS:
        rule = f"nodes({cluster.nodes}) · ranks_per_node({cluster.ranks_per_node}) = {ranks} ranks are more than"
        return None, [Problem("cluster.nodes", f"{rule} {MOST_RANKS:,}", "use fewer")]
    model_ranks = p.tp * p.pp * p.cp
    product = f"tp({p.tp}) · pp({p.pp}) · cp({p.cp})"
    if p.dp == "auto":
        if ranks % model_ranks:
            rule = f"the world of {plural(ranks, 'rank')} must be a multiple of {product} = {model_ranks}"
            return None, [Problem("parallel.dp", rule, "change a degree or the number of ranks")]
        dp = ranks // model_ranks
    else:
        dp = p.dp
        if dp * model_ranks != ranks:
            rule = f"dp({dp}) · {product} = {dp * model_ranks} must be the world of {plural(ranks, 'rank')}"
            return None, [Problem("parallel.dp", rule, "set dp: auto, or change a degree or the number of ranks")]
    dp_shard = dp if p.dp_shard == "full" else p.dp_shard
    problems = []
    if dp % dp_shard:
        problems.append(Problem("parallel.dp_shard", f"must divide dp = {dp}", f"one of {divisors(dp)}, or full"))
    stage = dp * p.cp * p.tp
    if stage % (p.ep * p.etp):
        rule = f"ep({p.ep}) · etp({p.etp}) = {p.ep * p.etp} must divide dp({dp}) · cp({p.cp}) · tp({p.tp}) = {stage}"
        problems.append(Problem("parallel.ep", rule, f"ep · etp must be one of {divisors(stage)}"))
    if problems:
        return None, problems
    edp = stage // (p.ep * p.etp)
    # Experts are sharded over the ranks that shard the dense layers, as far as ep leaves any of them.
    edp_shard = gcd(edp, max(1, dp_shard * p.cp * p.tp // (p.ep * p.etp))) if dp_shard > 1 else 1
    return Degrees(p.pp, dp // dp_shard, dp_shard, p.cp, p.tp, p.ep, p.etp, edp // edp_shard, edp_shard), []
