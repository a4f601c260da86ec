"""Rules and costs of dispatch, those of all dispatchers and of the configuration's own. Needs no torch."""

from __future__ import annotations

from collections import Counter
from math import ceil

from moesys.config.schema import Config, MoEConfig
from moesys.errors import Problem
from moesys.parallel.cost import Collective, StepShape
from moesys.parallel.degrees import EXPERT_AXES, Degrees
from moesys.parallel.dispatchers.kind import Beside, Transfer, describe
from moesys.words import plural

AXES = ("ep", "etp")
assert EXPERT_AXES[-2:] == AXES, "a group of experts is consecutive ranks"


def check(config: Config, degrees: Degrees) -> list[Problem]:
    """Every rule of parallel.dispatch that `config` breaks."""
    d, t, problems = config.parallel.dispatch, config.train, []
    tokens = t.micro_batch * t.seq_len // (degrees.cp * degrees.tp)
    if d.chunks > tokens:
        rule = f"a rank has train.micro_batch({t.micro_batch}) · train.seq_len({t.seq_len})"
        rule += f" / (cp({degrees.cp}) · tp({degrees.tp})) = {plural(tokens, 'token')} at once"
        rule += f", fewer than chunks({d.chunks})"
        problems.append(Problem("parallel.dispatch.chunks", rule, f"choose at most {tokens}"))
    return problems + describe(d).check(config, degrees)


def cost(shape: StepShape) -> list[Collective]:
    """The collectives of dispatch and combine of every MoE layer, forward and backward."""
    moe, d = shape.config.model.moe, shape.degrees
    if moe is None or d.ep * d.etp == 1:
        return []
    kind = describe(shape.config.parallel.dispatch)
    moves = [move for transfer in kind.transfers(shape) for move in _collectives(transfer, shape, moe)]
    return moves + [move for beside in kind.beside(shape) for move in _beside(beside, shape)]


def _beside(beside: Beside, shape: StepShape) -> list[Collective]:
    """The collectives of counts, ids or weights, over all chunks, layers and passes of a step."""
    passes = sum(map(shape.config.model.is_moe, shape.stage.layers)) * shape.micro_batches
    # As many chunks as there are for rows; slots, of which rows_per_token tells, go in one.
    calls = shape.config.parallel.dispatch.chunks if beside.chunked else 1
    moves = [Collective(beside.kind, AXES, beside.bytes / calls, shape.forwards * passes * calls, beside.level, True)]
    if beside.back:
        moves.append(Collective(beside.back, AXES, beside.back_bytes / calls, passes * calls, beside.level, True))
    return moves


def _collectives(transfer: Transfer, shape: StepShape, moe: MoEConfig) -> list[Collective]:
    """The collectives of one transfer, over all chunks, layers and passes of a step."""
    m, d, dispatch = shape.config.model, shape.degrees, shape.config.parallel.dispatch
    passes = sum(m.is_moe(i) for i in shape.stage.layers) * shape.micro_batches
    tokens = shape.sequence_tokens * moe.router.rows_per_token(shape.config.train.seq_len)
    tokens /= d.cp * d.tp * dispatch.chunks
    plain = m.hidden * shape.width
    there = m.hidden + 4 * ceil(m.hidden / 128) if dispatch.payload == "fp8" else plain
    # Forward rows go there and results come back by the other collective; gradients do both in turn.
    calls: Counter[tuple[str, int]] = Counter()
    calls[transfer.there, there] += shape.forwards * passes * dispatch.chunks
    calls[transfer.back, plain] += ((shape.forwards + 1) * dispatch.chunks - _spared(shape, moe, transfer)) * passes
    calls[transfer.there, plain] += passes * dispatch.chunks
    rows = tokens * transfer.rows
    return [Collective(name, AXES, rows * size, n, transfer.level) for (name, size), n in calls.items()]


def _spared(shape: StepShape, moe: MoEConfig, transfer: Transfer) -> int:
    """Chunks whose combine full recomputation skips.

    Backward needs nothing of what follows the experts of the last chunk, unless shared or other experts are computed
    there.
    """
    dispatch = shape.config.parallel.dispatch
    if shape.config.train.recompute != "full" or moe.router.rows_per_token(shape.config.train.seq_len) != 1:
        return 0
    later = moe.shared_experts and (not dispatch.overlap_shared or moe.shared_mix != "add")
    if later or moe.copy_experts or moe.constant_experts:
        return 0
    return 1 if transfer.inner else dispatch.chunks


def kept_rows(shape: StepShape) -> float:
    """Received rows that experts keep for backward, per token of a rank; 0 where nothing is sent."""
    d, moe = shape.degrees, shape.config.model.moe
    if moe is None or d.ep * d.etp == 1:
        return 0.0
    return describe(shape.config.parallel.dispatch).kept_rows(shape)
