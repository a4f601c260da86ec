"""The registry of dimensions: everything that starts from a configuration iterates over it.

A dimension is a module with `check(config, degrees)`: what is illegal and why; `apply(model, mesh,
config)`: the model transformed; `cost(shape)`: the collectives of one step; `shards(weight, degrees)`:
ways it splits a weight. None of these but `apply` needs torch.
"""

from __future__ import annotations

from math import prod
from typing import Protocol, cast

from moesys.config.schema import Config
from moesys.errors import Problem
from moesys.models.parts import pattern_rules, rope_rules
from moesys.models.parts.axes import Weight
from moesys.models.parts.model import mixers
from moesys.models.parts.moe import COUNTS, LOSSES, MoEFeedForward
from moesys.parallel import context, data, engine_check, expert, freeze, pipeline, tensor
from moesys.parallel.cost import Collective, StepShape, merged
from moesys.parallel.degrees import DENSE_AXES, Degrees, resolve
from moesys.parallel.dispatchers.plan import kept_rows


class Dimension(Protocol):
    """What each module of a dimension offers."""

    def check(self, config: Config, degrees: Degrees) -> list[Problem]:
        """The rules that `config` breaks."""

    def cost(self, shape: StepShape) -> list[Collective]:
        """The collectives of one step."""

    def shards(self, weight: Weight, degrees: Degrees) -> int:
        """The number of ways that it splits a weight."""


DIMENSIONS: dict[str, Dimension] = {
    name: cast(Dimension, module)
    for name, module in (
        ("pipeline", pipeline),
        ("context", context),
        ("tensor", tensor),
        ("expert", expert),
        ("data", data),
    )
}


def check(config: Config, world: int | None = None) -> list[Problem]:
    """Every rule between keys that `config` breaks on `world` ranks (default: the cluster's)."""
    problems = _model(config)
    if any(problem.key.startswith(("model.layers", "model.mixers")) for problem in problems):
        return problems  # nobody knows which blocks there are
    degrees, unresolved = resolve(config, world)
    if degrees is not None:
        return problems + _layout(config, degrees)
    # The size of the data axis is not known: what is wrong whatever it is does not hang on it.
    p = config.parallel
    first, *others = (_layout(config, Degrees(p.pp, dp, 1, p.cp, p.tp, p.ep, p.etp)) for dp in (1, 2, 3, 5))
    return problems + unresolved + [problem for problem in first if all(problem in other for other in others)]


def _layout(config: Config, degrees: Degrees) -> list[Problem]:
    """The rules of every dimension and of the engine."""
    problems = [problem for dimension in DIMENSIONS.values() for problem in dimension.check(config, degrees)]
    return problems + engine_check.check(config, degrees)


def _model(config: Config) -> list[Problem]:
    m = config.model
    problems = pattern_rules.check(m)
    if problems:
        return problems
    problems += [problem for mixer in mixers(m) for problem in (*mixer.unused(), *mixer.check())]
    problems += rope_rules.check(m, {mixer.rotary_dim for mixer in mixers(m)} - {0})
    if m.moe is not None:
        problems += MoEFeedForward(m.moe, m.hidden, 0).check()
    if m.head_bias and m.logits_divisor != 1:
        rule = f"({m.logits_divisor:g}) divides what the head multiplies, and model.head_bias would stay as it is"
        problems.append(Problem("model.logits_divisor", rule, "use either"))
    if m.ffn_hidden is None and len(m.moe_blocks) < m.depth:
        rule = "is needed: some layers are dense"
        problems.append(Problem("model.ffn_hidden", rule, "set it, or make every layer MoE"))
    if m.predicted >= config.train.seq_len:
        rule = f"must be less than train.seq_len({config.train.seq_len}), or there is no token to predict"
        problems.append(Problem("model.mtp.depth", rule, "use a smaller depth or longer sequences"))
    return problems + freeze.check(config)


def model_shards(weight: Weight, degrees: Degrees) -> int:
    """Ways that all dimensions but data split a weight."""
    return prod(d.shards(weight, degrees) for name, d in DIMENSIONS.items() if name != "data")


def step_shape(config: Config, degrees: Degrees, vocab_size: int, rank: int) -> list[StepShape]:
    """One training step as pipeline rank `rank` sees it: one entry per stage that it holds."""
    stages = tuple(pipeline.stages(config, vocab_size)[rank :: degrees.pp])
    shards = data.shards if config.engine == "native" else data.optimizer_shards
    return [StepShape(config, degrees, vocab_size, stage, model_shards, shards, kept_rows, stages) for stage in stages]


def traffic(shape: StepShape) -> list[Collective]:
    """The collectives of one step on a stage, of all dimensions and of the step itself; none over one rank."""
    moves = [move for dimension in DIMENSIONS.values() for move in dimension.cost(shape)]
    return merged(m for m in [*moves, *step(shape)] if shape.size(m.axes) > 1 and m.calls and m.bytes)


def step(shape: StepShape) -> list[Collective]:
    """The sums of a step over all ranks: of the gradients' norm and the loss, and of the metrics of a step that is due.

    Metrics are the losses of the next token and of later ones, the seconds of all-to-alls, and for each MoE layer what
    it reports. Megatron's norms are in float32, of dense weights and of experts that are spread apart.
    """
    if not shape.leads:
        return []
    model = shape.config.model
    reported = len(model.moe_blocks) * (model.moe.experts + len(COUNTS) + len(LOSSES)) if model.moe is not None else 0
    sums: list[tuple[tuple[str, ...], float]] = [(DENSE_AXES, 8.0 * (2 + model.predicted + reported))]
    if shape.config.engine == "native":
        sums.append((DENSE_AXES, 16.0))
    else:
        apart = [("pp", "ep", "etp")] * (shape.degrees.ep * shape.degrees.etp > 1)
        sums += [(axes, 4.0) for axes in (("pp", "tp"), *apart)]
    return [Collective("all_reduce", axes, size, 1, small=True) for axes, size in sums]
