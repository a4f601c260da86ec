"""The choice of `parallel.sync_gradients: auto`; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesys.config.schema import Config
from moesys.parallel.degrees import Degrees
from moesys.parallel.dimension import step_shape
from moesys.parallel.memory import estimate

Sync = Literal["once", "each"]
SYNCS: tuple[Sync, ...] = ("once", "each")


@dataclass(frozen=True)
class Settled:
    """The chosen value, and why; `needs`: bytes of the fullest rank (on CPU: node) with either."""

    sync: Sync
    why: str
    needs: dict[Sync, float]


def with_sync(config: Config, sync: Sync) -> Config:
    """`config` with this `parallel.sync_gradients`."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"sync_gradients": sync})})


def accumulates(config: Config, degrees: Degrees) -> bool:
    """Whether the two values differ: sharded gradients, and several micro-batches in a step."""
    several = config.train.global_batch > degrees.dp * config.train.micro_batch
    return config.engine == "native" and degrees.dp_shard > 1 and several


def settle(config: Config, degrees: Degrees, vocab_size: int) -> Settled | None:
    """The choice for a run of `config`; None where both values do the same."""
    if not accumulates(config, degrees):
        return None
    needs = {sync: _needs(with_sync(config, sync), degrees, vocab_size) for sync in SYNCS}
    asked, limit = config.parallel.sync_gradients, config.cluster.memory_gib
    if asked != "auto":
        return Settled(asked, "parallel.sync_gradients says so", needs)
    if limit is None:
        return Settled("once", "cluster.memory_gib is not given", needs)
    share = f"{needs['once'] / 2**30:.1f} of {limit:g} GiB"
    if needs["once"] <= limit * 2**30:
        return Settled("once", f"it fits with {share}", needs)
    return Settled("each", f"once does not fit with {share}", needs)


def settled(config: Config, degrees: Degrees, vocab_size: int) -> Config:
    """`config` with once or each for auto."""
    found = settle(config, degrees, vocab_size)
    return with_sync(config, "once" if found is None else found.sync)


def _needs(config: Config, degrees: Degrees, vocab_size: int) -> float:
    ranks = [estimate(step_shape(config, degrees, vocab_size, rank)).total for rank in range(degrees.pp)]
    return fullest(config, ranks, degrees.world)[1]


def fullest(config: Config, needs: list[float], world: int) -> tuple[str, float]:
    """The owner of `cluster.memory_gib` ("rank", or "node" on CPU), and the most bytes that one of them needs.

    `needs`: bytes of each pipeline rank; the ranks of a stage need the same. Nodes are filled in the order of ranks.
    """
    if config.cluster.device != "cpu":
        return "rank", max(needs)
    per_stage, per_node = world // len(needs), config.cluster.ranks_per_node
    held = [needs[rank // per_stage] for rank in range(world)]
    return "node", max(sum(held[first : first + per_node]) for first in range(0, world, per_node))
