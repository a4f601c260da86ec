"""Context parallelism: every sequence split over cp ranks, for causal attention, with balanced work.

The sequence is cut into 2·cp chunks and rank r holds chunks r and 2·cp−1−r, so that every rank
attends to equally many keys. Keys and values are gathered, each rank attends with its own queries
(as in Llama 3, arXiv 2407.21783, section 3.3.2); in backward their gradients are reduce-scattered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from moesys.config.schema import Config
from moesys.errors import Problem
from moesys.models.parts.axes import Weight
from moesys.models.parts.mixer import Mixer
from moesys.models.parts.model import block as describe
from moesys.parallel.cost import Collective, StepShape
from moesys.parallel.degrees import Degrees

if TYPE_CHECKING:
    from moesys.models.attention import CausalCore
    from moesys.models.decoder import Decoder
    from moesys.parallel.mesh import ParallelMesh


def chunks(seq_len: int, cp: int, rank: int) -> list[range]:
    """The two ranges of positions that context rank `rank` holds, in order; all of them for cp 1."""
    if cp == 1:
        return [range(seq_len)]
    size = seq_len // (2 * cp)
    return [range(c * size, (c + 1) * size) for c in (rank, 2 * cp - 1 - rank)]


def check(config: Config, degrees: Degrees) -> list[Problem]:
    """Rules of context parallelism that `config` breaks."""
    cp, seq = degrees.cp, config.train.seq_len
    if cp > 1 and seq % (2 * cp):
        rule = f"2 · cp({cp}) = {2 * cp} must divide train.seq_len({seq}): each rank holds two chunks"
        return [Problem("parallel.cp", rule, f"make train.seq_len a multiple of {2 * cp}")]
    return []


def shards(weight: Weight, degrees: Degrees) -> int:
    """Context ranks hold whole weights (they share data's sharding)."""
    return 1


def cost(shape: StepShape) -> list[Collective]:
    """Keys and values gathered in every layer, their gradients scattered."""
    d, calls = shape.degrees, shape.micro_batches
    moves = []
    for mixer in (placed.part for placed in shape.blocks if isinstance(placed.part, Mixer)):
        for axis in mixer.gathered():
            ways = d.tp if axis.split_by == "tp" else 1
            size = shape.sequence_tokens * axis.size / ways * shape.width
            moves.append(Collective("all_gather", ("cp",), size, calls * shape.forwards))
            moves.append(Collective("reduce_scatter", ("cp",), size, calls))
    return moves


def apply(model: Decoder, mesh: ParallelMesh, config: Config) -> Decoder:
    """Give the model its positions, and attention that reaches over the context ranks."""
    import torch

    from moesys.parallel.gathered_attention import GatheredCore

    cp, rank = mesh.degrees.cp, mesh.place["cp"]
    held = chunks(config.train.seq_len, cp, rank)
    model.positions = torch.cat([torch.arange(r.start, r.stop) for r in held]).to(mesh.device)
    model.length = config.train.seq_len
    group = mesh.group("cp")
    if group is not None:
        for name, block in model.layers.items():
            if any(describe(config.model, int(name)).mixer.gathered()):
                attention = block.get_submodule("attention")
                core = cast("CausalCore", attention.core)
                attention.core = GatheredCore(group, config.train.seq_len, core.window, core.scale)
    return model
