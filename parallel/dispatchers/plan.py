"""What dispatchers need and move, told from the configuration. Needs no torch."""

from __future__ import annotations

from collections import Counter
from math import ceil, prod

from moesys.config.schema import Config, MoEConfig
from moesys.errors import Problem
from moesys.parallel import nodes
from moesys.parallel.cost import Collective, StepShape
from moesys.parallel.degrees import EXPERT_AXES, Degrees
from moesys.words import plural

AXES = ("ep", "etp")


def check(config: Config, degrees: Degrees) -> list[Problem]:
    """Every rule of parallel.dispatch that `config` breaks."""
    d, t, problems = config.parallel.dispatch, config.train, []
    tokens = t.micro_batch * t.seq_len // (degrees.cp * degrees.tp)
    if d.chunks > tokens:
        rule = f"a rank has train.micro_batch({t.micro_batch}) · train.seq_len({t.seq_len})"
        rule += f" / (cp({degrees.cp}) · tp({degrees.tp})) = {plural(tokens, 'token')} at once"
        rule += f", fewer than chunks({d.chunks})"
        problems.append(Problem("parallel.dispatch.chunks", rule, f"choose at most {tokens}"))
    if d.kind == "hierarchical" and not all(map(nodes.even, _groups(config, degrees))):
        size, per_node = degrees.ep * degrees.etp, config.cluster.ranks_per_node
        rule = f"expert groups of ep({degrees.ep}) · etp({degrees.etp}) = {size} ranks have unequal parts on nodes of"
        rule += f" cluster.ranks_per_node({per_node}): hierarchical dispatch pairs the ranks of every two nodes"
        remedy = f"make ep · etp a multiple or a divisor of {per_node}, or use dispatch: all_to_all"
        problems.append(Problem("parallel.dispatch.kind", rule, remedy))
    return problems


def _groups(config: Config, degrees: Degrees) -> list[list[int]]:
    """The nodes of the ranks of every expert group."""
    size = degrees.ep * degrees.etp
    assert EXPERT_AXES[-2:] == AXES  # so that a group is consecutive ranks
    starts = range(0, degrees.world, size)
    return [nodes.planned(range(start, start + size), config.cluster) for start in starts]


def cost(shape: StepShape) -> list[Collective]:
    """Rows of tokens on their way to experts and back, forward and backward, of every MoE layer.

    Left out: counts, and each assignment's weight and name (4 to 12 bytes beside a row of thousands).
    """
    m, d = shape.config.model, shape.degrees
    moe = m.moe
    if moe is None or d.ep * d.etp == 1:
        return []
    dispatch, layers = shape.config.parallel.dispatch, sum(m.is_moe(i) for i in shape.stage.layers)
    rows_per_token = moe.router.rows_per_token(shape.config.train.seq_len)
    tokens = shape.sequence_tokens * rows_per_token / (d.cp * d.tp) / dispatch.chunks
    plain = m.hidden * shape.width
    there = m.hidden + 4 * ceil(m.hidden / 128) if dispatch.payload == "fp8" else plain
    passes = layers * shape.micro_batches

    def moves(kind: str, back: str, rows: float, level: str = "", inner: bool = True) -> list[Collective]:
        # Forward rows go there and results come back by the other operation; gradients do both in turn.
        calls: Counter[tuple[str, int]] = Counter()
        calls[kind, there] += shape.forwards * passes * dispatch.chunks
        calls[back, plain] += ((shape.forwards + 1) * dispatch.chunks - _spared(shape, moe, inner)) * passes
        calls[kind, plain] += passes * dispatch.chunks
        return [Collective(name, AXES, tokens * rows * size, n, level) for (name, size), n in calls.items()]

    if dispatch.kind == "all_gather":
        return moves("all_gather", "reduce_scatter", d.ep * d.etp)
    if dispatch.kind == "all_to_all":
        return moves("all_to_all", "all_to_all", moe.router.mean_choices * d.etp)
    levels = reached(shape)
    every = [moves("all_to_all", "all_to_all", levels[level], level, level == [*levels][-1]) for level in levels]
    return [move for some in every for move in some]


def _spared(shape: StepShape, moe: MoEConfig, inner: bool) -> int:
    """Chunks whose results full recomputation does not send back: backward needs nothing of what follows the
    experts of the last one, unless shared experts or others are computed there."""
    dispatch = shape.config.parallel.dispatch
    if shape.config.train.recompute != "full" or moe.router.rows_per_token(shape.config.train.seq_len) != 1:
        return 0
    later = moe.shared_experts and (not dispatch.overlap_shared or moe.shared_mix != "add")
    if later or moe.copy_experts or moe.constant_experts:
        return 0
    return 1 if inner else dispatch.chunks


def reached(shape: StepShape) -> dict[str, float]:
    """Rows per token on each level of hierarchical dispatch: the nodes, and the ranks, that hold its experts.

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


def kept_rows(shape: StepShape) -> float:
    """Rows that experts keep for backward because they travelled, per token of a rank."""
    d, moe, dispatch = shape.degrees, shape.config.model.moe, shape.config.parallel.dispatch
    if moe is None or d.ep * d.etp == 1:
        return 0.0
    if dispatch.kind == "all_gather":
        return d.ep * d.etp
    return (
        moe.router.mean_choices * d.etp
        if dispatch.kind == "all_to_all"
        else d.ep * d.etp * _hit(moe, moe.experts // d.ep)
    )
