"""`moesys bench a2a`: the benchmark of collectives as a run of its own, on the ranks that a launcher places."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moesys import leftovers
from moesys.config.load import dump
from moesys.config.schema import Config
from moesys.errors import MoesysError
from moesys.files import read_json, write_json
from moesys.launchers.launch import run, workers
from moesys.launchers.spec import RunSpec
from moesys.launchers.stop import StopRequests
from moesys.measure import traffic
from moesys.measure.bench_a2a import Options
from moesys.measure.bench_result import Result, flat, lines
from moesys.measure.links import Line, Profile
from moesys.measure.sizes import COLLECTIVES, GROUPS, human
from moesys.train import routing_files
from moesys.train.checked import load_checked
from moesys.version import __version__
from moesys.words import plural

WIDTH = 112
"""Columns of the table: it is not cut where a terminal has fewer."""


LARGER = "measure several sizes and larger ones, as --min 1K --max 64M"


class BenchError(MoesysError):
    """An option of the benchmark makes no sense."""

    exit_code = 2


def options_of(arguments: argparse.Namespace, config: Config) -> Options:
    """What the command line asks for.

    Raises:
        BenchError: it makes no sense. TrafficError: the matrix cannot be read.
    """
    if arguments.factor < 2 or arguments.iterations < 1 or arguments.warmup < 0:
        raise BenchError("--factor must be at least 2, --iterations at least 1, and --warmup at least 0")
    if arguments.max < arguments.min:
        raise BenchError(f"--max {arguments.max} is less than --min {arguments.min}")
    groups, moe = arguments.groups or GROUPS, config.model.moe
    world = config.cluster.nodes * config.cluster.ranks_per_node
    uneven = [f"--{name}" for name in ("skew", "matrix", "routing") if getattr(arguments, name) is not None]
    if len(uneven) > 1:
        raise BenchError(f"{' and '.join(uneven)}: give one pattern of uneven traffic")
    matrix = None
    if arguments.matrix is not None or arguments.routing is not None:
        if arguments.groups not in (None, ["world"]):
            raise BenchError(f"{uneven[0]} is of all ranks: leave --groups out, or say --groups world")
        groups = ("world",)
        matrix = traffic.read(arguments.matrix, world) if arguments.matrix else routed(arguments.routing, config)
    if arguments.dispatch and (moe is None or config.parallel.ep * config.parallel.etp == 1):
        raise BenchError("--dispatch needs experts over several ranks: set model.moe, and parallel.ep to more than 1")
    if moe is not None and not 1 <= arguments.top_k <= moe.experts:
        raise BenchError(f"--top-k {arguments.top_k}: there are model.moe.experts({moe.experts}) to choose from")
    if min(arguments.tokens, arguments.hidden) < 1:
        raise BenchError("--tokens and --hidden must be at least 1")
    return Options(
        kinds=arguments.collectives or (() if arguments.dispatch else COLLECTIVES),
        groups=groups,
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


def routed(folder: Path, config: Config) -> traffic.Matrix:
    """Rows that each rank sent to each in a recorded run, over its layers and steps.

    Raises:
        BenchError: it was recorded with another number of ranks or experts.
    """
    world, ep = config.cluster.nodes * config.cluster.ranks_per_node, max(1, config.parallel.ep)
    matrix = [[0] * world for _ in range(world)]
    for rank, experts, chosen in routing_files.assignments(folder):
        if rank >= world or experts % ep or config.parallel.etp > 1:
            rule = f"was recorded with at least {plural(rank + 1, 'rank')} and {plural(experts, 'expert')}"
            raise BenchError(f"--routing {folder} {rule}: give the configuration it was recorded with, without etp")
        first = rank // ep * ep
        for expert, rows in enumerate(chosen):
            matrix[rank][first + expert // (experts // ep)] += rows
    return matrix


def command(arguments: argparse.Namespace) -> int:
    """Launch the benchmark, show its table, and write what was asked for."""
    overrides = list(arguments.overrides)
    if arguments.launcher:
        overrides.append(f"launch.launcher={arguments.launcher}")
    config = load_checked(arguments.config, overrides, with_data=False)
    world = config.cluster.nodes * config.cluster.ranks_per_node
    if world < 2:
        raise BenchError("one rank has nobody to send to: set cluster.ranks_per_node or cluster.nodes to more")
    options = options_of(arguments, config)
    base = Path(config.output.runs).expanduser()
    base.mkdir(parents=True, exist_ok=True)
    with leftovers.temporary("bench-a2a-", base) as folder:
        spec = RunSpec.of(config, folder)
        (spec.run_dir / "config.yaml").write_text(dump(spec.config))
        write_json(spec.run_dir / "bench.json", asdict(options))
        started = workers(spec, config.launch.launcher, "moesys.train.a2a")
        follow = Follow(spec.run_dir / "follow.jsonl", Console(stderr=True))
        with StopRequests() as stop:
            outcome = run(started, spec, follow, stop)
        if outcome.exit_code:
            print(f"moesys: {outcome.message}", file=sys.stderr)
            return outcome.exit_code
        found = read_json(spec.run_dir / "results.json", "run the benchmark again")
    results = [Result(**result) for result in found["results"]]
    show(results, found["facts"], Console(width=max(WIDTH, Console().width)))
    if arguments.json is not None:
        write_json(arguments.json, as_json(results, found["facts"], options))
    if arguments.profile is not None:
        facts = {"date": date.today().isoformat(), **found["facts"]}
        if not lines(results):
            raise BenchError(f"{arguments.profile} is not written: no link could be fitted\n    remedy: {LARGER}")
        Profile(lines(results), facts).save(arguments.profile)
    return 1 if any(result.wrong for result in results) else 0


class Follow:
    """Shows each result as it comes."""

    failed = False

    def __init__(self, path: Path, console: Console):
        self._path, self._console, self._seen = path, console, 0

    def phase(self, text: str) -> None:
        """What is being waited for."""
        self._console.print(f"{text} …", highlight=False)

    def tell(self, lines: Iterable[str]) -> None:
        """Lines to be read now."""
        for line in lines:
            self._console.print(line, highlight=False)

    def refresh(self) -> None:
        """Show what is new."""
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            whole = [line for line in lines[self._seen :] if line.endswith("\n")]
            self._seen += len(whole)
            self.tell(map(told, whole))


def told(line: str) -> str:
    """One line of progress for a result as JSON."""
    r = json.loads(line)
    return f"{r['collective']:<17} {r['group']:<6} {human(r['size']):>8} {r['out_of_place']['time']:>12,.1f} µs"


def show(results: list[Result], facts: dict[str, Any], console: Console) -> None:
    """A table for each collective and group, and the fitted links."""
    hosts = len(set(facts["hosts"]))
    console.print(
        f"{plural(facts['ranks'], 'rank')} on {plural(hosts, 'node')}, {facts['backend']}, {facts['device']}, "
        f"torch {torch.__version__}, moesys {__version__}, {date.today().isoformat()}"
    )
    console.print("bytes: what a rank sends in all, its own part included; algbw = bytes / time, busbw as nccl-tests")
    seen = dict.fromkeys((r.kind, r.group, r.dtype) for r in results)
    for kind, group, dtype in seen:
        mine = [r for r in results if (r.kind, r.group, r.dtype) == (kind, group, dtype)]
        console.print(table(mine, f"{kind}, {mine[0].names} groups of {mine[0].ranks}, {dtype}"))
    fitted = Table(title="links: seconds = α + bytes / β", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("collective", "α µs", "β GB/s", "median error", "worst"):
        fitted.add_column(name, justify="left" if name == "collective" else "right")
    for name, line in lines(results).items():
        values = f"{line.alpha * 1e6:,.1f}", f"{line.bandwidth / 1e9:.3f}", f"{line.error:.0%}", f"{line.worst:.0%}"
        fitted.add_row(name, *values)
    if fitted.row_count:
        console.print(fitted)
    untold: dict[Line, list[str]] = {}
    for name, line in flat(results).items():
        untold.setdefault(line, []).append(name)
    for line, names in untold.items():
        console.print(
            f"{' = '.join(names)}: no bandwidth can be told (β = ∞): up to {human(int(line.largest))} took no longer "
            f"than {human(int(line.smallest))}, so it is in no profile; {LARGER}",
            highlight=False,
            soft_wrap=True,
        )


def table(results: list[Result], title: str) -> Table:
    """One row for each size; microseconds and 10⁹ bytes per second."""
    plain = any(r.plain is not None for r in results)
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    names = ["bytes", "median\nµs", "min", "p95", "max", "wait", "transfer", "algbw\nGB/s", "busbw", "wrong"]
    for name in [*names, *(["/ plain"] if plain else []), "waited\nfor"]:
        shown.add_column(name, justify="right", no_wrap=True)
    for r in results:
        facts = r.as_json()
        per = facts["out_of_place_per_iter"]
        times = per["p50_us"], per["min_us"], per["p95_us"], per["max_us"], facts["wait_us"], facts["transfer_us"]
        rates = [f"{r.algbw / 1e9:.3f}", f"{r.busbw / 1e9:.3f}", str(r.wrong)]
        ratio = [] if not plain else ["" if r.plain is None else f"{r.seconds / r.plain:.2f} ± {r.noise:.2f}"]
        late = "" if r.straggler is None else f"rank {r.straggler[0]}"
        shown.add_row(human(r.bytes), *(f"{t:.0f}" for t in times), *rates, *ratio, late)
    return shown


def as_json(results: list[Result], facts: dict[str, Any], options: Options) -> dict[str, Any]:
    """The shape of nccl-tests' `-J`, with our own keys after theirs."""
    rates = [r.busbw / 1e9 for r in results]
    return {
        "version": __version__,
        "args": asdict(options),
        "env": {k: v for k, v in os.environ.items() if k.startswith(("NCCL_", "GLOO_"))},
        "nccl_version": ".".join(map(str, torch.cuda.nccl.version())) if facts["backend"] == "nccl" else None,
        "config": {**facts, "host": socket.gethostname(), "torch": torch.__version__, "date": date.today().isoformat()},
        "results": [r.as_json() for r in results],
        "out_of_bounds": sum(r.wrong for r in results),
        "average_bus_bandwidth": sum(rates) / len(rates) if rates else None,
        "links": {name: asdict(line) for name, line in lines(results).items()},
    }
