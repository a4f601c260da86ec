"""The description of dispatch in levels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from math import prod
from operator import mul
from typing import TYPE_CHECKING

from moesys.errors import Problem
from moesys.parallel import nodes
from moesys.parallel.dispatchers.kind import COUNT, ID, WEIGHT, Beside, DispatcherKind, Transfer, assignments

if TYPE_CHECKING:
    from moesys.config.schema import Config, MoEConfig
    from moesys.parallel.cost import StepShape
    from moesys.parallel.degrees import Degrees
    from moesys.parallel.dispatchers.base import ExpertParallelDispatcher
    from moesys.parallel.dispatchers.ranks import ExpertRanks


class Hierarchical(DispatcherKind):
    """A token once to each node that holds any of its experts, then once to each rank there."""

    kind = "hierarchical"
    summary = (
        "once to each node that holds any of a token's experts, then once to each rank there (groups that span nodes)"
    )
    aliases = ("two_level", "2dh")
    for_nodes = True

    def check(self, config: Config, degrees: Degrees) -> list[Problem]:
        """Nodes have equal parts of each expert group, so that their ranks pair up."""
        if all(map(nodes.even, _groups(config, degrees))):
            return []
        size, per_node = degrees.ep * degrees.etp, config.cluster.ranks_per_node
        rule = f"expert groups of ep({degrees.ep}) · etp({degrees.etp}) = {size} ranks have unequal parts on nodes of"
        rule += f" cluster.ranks_per_node({per_node}): hierarchical dispatch pairs the ranks of every two nodes"
        remedy = f"make ep · etp a multiple or a divisor of {per_node}, or use dispatch: all_to_all"
        return [Problem("parallel.dispatch.kind", rule, remedy)]

    def transfers(self, shape: StepShape) -> Iterator[Transfer]:
        """On each level, a token once to each destination that holds any of its experts."""
        levels = reached(shape)
        for level, rows in levels.items():
            yield Transfer("all_to_all", "all_to_all", rows, level, inner=level == [*levels][-1])

    def beside(self, shape: StepShape) -> Iterator[Beside]:
        """On each level, counts of rows and of assignments for all levels that follow; ids and weights of these."""
        moe, ways = shape.config.model.moe, _ways(shape)
        assert moe is not None
        back = "all_to_all_weights" if moe.router.weighted and moe.router.learned else ""
        for number, level in enumerate(ways):
            rest = list(accumulate([*ways.values()][number:], mul))
            counts = sum(rest) + rest[-1]
            yield Beside("all_to_all_counts", COUNT * self.dispatch.chunks * counts, chunked=False, level=level)
            sent = assignments(shape)
            yield Beside("all_to_all_weights", (ID + WEIGHT) * sent, True, back, WEIGHT * sent, level)

    def kept_rows(self, shape: StepShape) -> float:
        """A token once on each rank that holds any of its experts."""
        d, moe = shape.degrees, shape.config.model.moe
        assert moe is not None
        return d.ep * d.etp * _hit(moe, moe.experts // d.ep)

    def build(self, ranks: ExpertRanks) -> Callable[[int], ExpertParallelDispatcher]:
        """A `HierarchicalDispatcher` for each layer, all on the same levels."""
        from moesys.parallel.dispatchers.hierarchical import HierarchicalDispatcher
        from moesys.parallel.dispatchers.levels import shared_levels

        options = {"levels": shared_levels(ranks), **self.options()}
        return lambda experts: HierarchicalDispatcher(experts, ranks.group, ranks.ep, ranks.etp, **options)


def _groups(config: Config, degrees: Degrees) -> list[list[int]]:
    """The nodes of the ranks of every expert group."""
    size = degrees.ep * degrees.etp
    # ep and etp are the last axes of the experts' mesh: a group is consecutive ranks.
    starts = range(0, degrees.world, size)
    return [nodes.planned(range(start, start + size), config.cluster) for start in starts]


def _ways(shape: StepShape) -> dict[str, int]:
    """Destinations of each level."""
    size = shape.degrees.ep * shape.degrees.etp
    members = nodes.members(nodes.planned(range(size), shape.config.cluster))
    if len(members) == 1:
        return {"intra": size}
    return {"inter": size} if len(members) == size else {"inter": len(members), "intra": len(members[0])}


def reached(shape: StepShape) -> dict[str, float]:
    """Rows per token on each level: the nodes, and the ranks, that hold its experts.

    Expected for routing that chooses k of E experts with equal chances: a destination that holds e of them
    is reached with probability 1 − C(E−e, k) / C(E, k), nearly 1 − (1 − e/E)^k.
    """
    config, d = shape.config, shape.degrees
    moe = config.model.moe
    assert moe is not None
    local, size = moe.experts // d.ep, d.ep * d.etp
    # All expert groups lie alike on the nodes, or the configuration is refused.
    members = nodes.members(nodes.planned(range(size), config.cluster))
    held = [local * len({place // d.etp for place in node}) for node in members]
    between = sum(_hit(moe, experts) for experts in held)
    within = size * _hit(moe, local)
    if len(members) == 1:
        return {"intra": within}
    return {"inter": between} if len(members) == size else {"inter": between, "intra": within}


def _hit(moe: MoEConfig, experts: int) -> float:
    """Probability that a token chooses any of so many experts."""
    every = moe.experts + moe.zero_computation
    return 1 - prod((every - experts - i) / (every - i) for i in range(moe.router.choices) if every > i)
