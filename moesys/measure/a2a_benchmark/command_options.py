"""The command line of `moesys bench a2a`, checked against the configuration."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from moesys.config.schema import Config
from moesys.errors import MoesysError
from moesys.measure.a2a_benchmark import traffic
from moesys.measure.a2a_benchmark.options import BenchmarkOptions
from moesys.measure.a2a_benchmark.sizes import COLLECTIVES, GROUPS
from moesys.measure.a2a_benchmark.traffic import Matrix

ReadRouting = Callable[[Path, Config], Matrix]
"""(folder of recorded routing, configuration) → rows that each rank sends to each."""


class A2ABenchError(MoesysError):
    """An option of the benchmark makes no sense."""

    exit_code = 2


def options_of(arguments: argparse.Namespace, config: Config, read_routing: ReadRouting) -> BenchmarkOptions:
    """The options that the command line asks for.

    Raises:
        A2ABenchError: they make no sense. TrafficError: the matrix cannot be read.
    """
    _check(arguments, config)
    matrix = _matrix(arguments, config, read_routing)
    return BenchmarkOptions(
        kinds=arguments.collectives or (() if arguments.dispatch else COLLECTIVES),
        groups=("world",) if matrix is not None else arguments.groups or GROUPS,
        dtypes=arguments.dtypes,
        smallest=arguments.min,
        largest=arguments.max,
        factor=arguments.factor,
        iterations=arguments.iterations,
        warmup=arguments.warmup,
        skew=arguments.skew,
        matrix=matrix,
        check=arguments.check,
        plain=arguments.plain,
        dispatch=arguments.dispatch or (),
        tokens=arguments.tokens,
        hidden=arguments.hidden,
        top_k=arguments.top_k,
    )


def _check(arguments: argparse.Namespace, config: Config) -> None:
    """Raise A2ABenchError for the first option that makes no sense."""
    moe = config.model.moe
    if arguments.factor < 2 or arguments.iterations < 1 or arguments.warmup < 0:
        raise A2ABenchError("--factor must be at least 2, --iterations at least 1, and --warmup at least 0")
    if arguments.max < arguments.min:
        raise A2ABenchError(f"--max {arguments.max} is less than --min {arguments.min}")
    uneven = _uneven(arguments)
    if len(uneven) > 1:
        raise A2ABenchError(f"{' and '.join(uneven)}: give one pattern of uneven traffic")
    if uneven and uneven != ["--skew"] and arguments.groups not in (None, ["world"]):
        raise A2ABenchError(f"{uneven[0]} is of all ranks: leave --groups out, or say --groups world")
    if arguments.dispatch and (moe is None or config.parallel.ep * config.parallel.etp == 1):
        raise A2ABenchError(
            "--dispatch needs experts over several ranks: set model.moe, and parallel.ep to more than 1"
        )
    if moe is not None and not 1 <= arguments.top_k <= moe.experts:
        raise A2ABenchError(f"--top-k {arguments.top_k}: there are model.moe.experts({moe.experts}) to choose from")
    if min(arguments.tokens, arguments.hidden) < 1:
        raise A2ABenchError("--tokens and --hidden must be at least 1")


def _uneven(arguments: argparse.Namespace) -> list[str]:
    """The options for uneven traffic that were given."""
    return [f"--{name}" for name in ("skew", "matrix", "routing") if getattr(arguments, name) is not None]


def _matrix(arguments: argparse.Namespace, config: Config, read_routing: ReadRouting) -> Matrix | None:
    """The byte matrix of `--matrix` or `--routing`; None without either."""
    if arguments.matrix is not None:
        return traffic.read(arguments.matrix, config.cluster.nodes * config.cluster.ranks_per_node)
    return None if arguments.routing is None else read_routing(arguments.routing, config)
